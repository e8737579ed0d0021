"""`eval` as users run it: scores of files, of a model, of several compared, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from rich.console import Console

import chatglm_tuning.loading
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.config.evaluate import parse_eval_arguments
from chatglm_tuning.evaluation.metrics import Answered, row_scores, score_all
from tests.evaluation.pairs import pairs
from tests.evaluation.places import make_place

METRICS = {"loss", "rouge-1", "rouge-2", "rouge-l", "bleu-4", "chrf", "distinct-2"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("eval"), rows=12)


@pytest.fixture(scope="module")
def compared(place, tmp_path_factory):
    """The output of one comparison of all three."""
    folder = tmp_path_factory.mktemp("compared") / "output"
    argv = ["--compare", str(place.lora), str(place.prefix), "base", *place.flags(folder)]
    assert run_command("eval", argv) == 0
    return folder


def write_predictions(path, rows, references=1):
    lines = [
        {"prompt": f"p{index}", "references": [reference] * references, "prediction": prediction}
        for index, (prediction, reference) in enumerate(rows)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def scores(folder):
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


def test_a_file_is_scored_as_the_libraries_score_it(tmp_path, capsys):
    rows = pairs(30)
    path = write_predictions(tmp_path / "mine.jsonl", rows)
    assert run_command("eval", ["--predictions", str(path), "--output_dir", str(tmp_path / "out")]) == 0
    found = scores(tmp_path / "out")["systems"][str(path)]
    alone = [row_scores(*row) for row in rows]
    for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4", "chrf"):
        value = float(np.mean([row[name] for row in alone]))
        assert found["metrics"][name]["value"] == pytest.approx(value, abs=1e-6)
        assert found["metrics"][name]["low"] < value < found["metrics"][name]["high"]
    printed = capsys.readouterr().out
    assert f"{np.mean([row['rouge-l'] for row in alone]):.2f} (" in printed
    assert "references each: every pair of a prompt and a reference is a row by itself" in printed
    assert (found["prompts"], found["rows"]) == (30, 30)
    lines = (tmp_path / "out" / "prompt_scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["scores"]["chrf"] for line in lines] == [row["chrf"] for row in alone]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["prompt_scores.jsonl", "scores.json"]


def test_the_convention_for_several_references_is_chosen_and_told(place, compared, tmp_path, capsys):
    path = compared / "base" / "predictions.jsonl"
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = [Answered(line["prompt"], line["prediction"], tuple(line["references"])) for line in answers]
    found = {}
    for convention in ("each", "best"):
        argv = ["--predictions", str(path), "--references", convention, "--output_dir", str(tmp_path / convention)]
        assert run_command("eval", argv) == 0
        assert f"references {convention}: " in capsys.readouterr().out
        content = scores(tmp_path / convention)
        assert content["references"] == convention
        found[convention] = content["systems"][str(path)]
        value = found[convention]["metrics"]["rouge-l"]["value"]
        assert value == pytest.approx(score_all(answers, convention)["rouge-l"], abs=1e-9)
    assert found["each"]["metrics"]["chrf"]["value"] != found["best"]["metrics"]["chrf"]["value"]
    assert (found["each"]["rows"], found["best"]["rows"]) == (17, 13)


def test_a_comparison_has_all_metrics_differences_and_files(place, compared):
    content = scores(compared)
    assert list(content["systems"]) == ["lora", "prefix", "base"]
    assert content["baseline"] == "base"
    assert set(content["differences"]) == {"lora", "prefix"}
    for name, system in content["systems"].items():
        assert set(system["metrics"]) == METRICS
        predicted = (compared / name / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert system["cut_answers"] == sum(json.loads(line)["finish_reason"] == "length" for line in predicted)
        for metric, interval in system["metrics"].items():
            assert interval["low"] <= interval["value"] <= interval["high"]
            if name != "base":
                gap = content["differences"][name][metric]
                base = content["systems"]["base"]["metrics"][metric]["value"]
                assert gap["value"] == pytest.approx(interval["value"] - base, abs=1e-9)
                assert gap["is_real"] == (gap["low"] > 0 or gap["high"] < 0)
    assert content["differences"]["lora"]["loss"]["is_real"]
    assert (compared / "comparison.png").read_bytes().startswith(b"\x89PNG")
    lines = (compared / "prompt_scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 * 13


def test_each_of_a_comparison_is_what_eval_finds_alone(place, compared, tmp_path):
    for name, flags in (("lora", ["--lora_checkpoint", place.lora]), ("base", [])):
        folder = tmp_path / name
        assert run_command("eval", place.flags(folder, *flags)) == 0
        alone, together = scores(folder)["systems"][name], scores(compared)["systems"][name]
        assert alone == together
        assert (folder / "predictions.jsonl").read_bytes() == (compared / name / "predictions.jsonl").read_bytes()


def test_a_rerun_loads_nothing_and_finds_the_same(place, compared, tmp_path, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in compared.rglob("*") if path.is_file()}
    monkeypatch.setattr(chatglm_tuning.loading, "load_base", None)
    argv = ["--compare", str(place.lora), str(place.prefix), "base", *place.flags(compared)]
    assert run_command("eval", [*argv, "--baseline", "lora"]) == 0
    assert "differences from lora" in capsys.readouterr().out
    assert run_command("eval", argv) == 0
    assert {path: path.read_bytes() for path in compared.rglob("*") if path.is_file()} == before


def test_a_file_can_be_compared_with_a_model(place, compared, tmp_path):
    argv = ["--compare", str(compared / "lora" / "predictions.jsonl"), "base"]
    assert run_command("eval", [*argv, *place.flags(tmp_path / "out")]) == 0
    content = scores(tmp_path / "out")
    assert set(content["systems"]) == {"lora", "base"}
    together = scores(compared)["differences"]["lora"]["rouge-1"]
    assert content["differences"]["lora"]["rouge-1"] == together
    assert "loss" not in content["differences"]["lora"]  # a file has none


def test_the_verdict_is_printed(tmp_path, capsys):
    rows = pairs(50)[12:]
    good = write_predictions(tmp_path / "good.jsonl", rows)
    same = write_predictions(tmp_path / "same.jsonl", rows)
    poor = write_predictions(tmp_path / "poor.jsonl", [("好", reference) for _, reference in rows])
    argv = ["--compare", str(good), str(same), str(poor), "--output_dir", str(tmp_path / "out")]
    assert run_command("eval", [*argv, "--baseline", str(good)]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "rouge-l" in line and "+" in line)
    assert "no: may be chance" in row
    assert "yes: worse" in row


def test_operands_of_one_name_are_told_apart(tmp_path):
    rows = pairs(5)
    one = write_predictions(tmp_path / "a" / "x" / "predictions.jsonl", rows)
    other = write_predictions(tmp_path / "b" / "x" / "predictions.jsonl", rows)
    third = write_predictions(tmp_path / "c.jsonl", rows)
    argv = ["--compare", str(one), str(other), str(third), "--output_dir", str(tmp_path / "out")]
    assert [operand.name for operand in parse_eval_arguments(argv).compare] == [str(one), str(other), "c"]


def rows_with(change):
    row = {"prompt": "p", "references": ["r"], "prediction": "x"}
    return json.dumps({**row, **change}) + "\n"


BAD = [
    (["--predictions", "{tmp}/none.jsonl"], "{tmp}/none.jsonl: there is no such file"),
    (["--predictions", "{root}"], "{root}: this is a folder, not a file"),
    (["--predictions", "{root}/rows.jsonl"], '{root}/rows.jsonl:1: "prediction" is missing, or no string'),
    (["--predictions", "{tmp}/broken.jsonl"], "{tmp}/broken.jsonl:2: not JSON"),
    (["--predictions", "{tmp}/no-references.jsonl"], '{tmp}/no-references.jsonl:1: "references" is missing'),
    (["--predictions", "{tmp}/good.jsonl", "--data_path", "x"], "--data_path changes nothing where --predictions are"),
    (["--predictions", "{tmp}/good.jsonl", "--compare", "base"], "--predictions and --compare are both given"),
    (["--predictions", "{tmp}/good.jsonl", "--references", "all"], "--references must be each or best"),
    (["--predictions", "{tmp}/good.jsonl", "--output_dir", "{tmp}/good.jsonl"], "output_dir is a file"),
    (["--predictions", "{tmp}/good.jsonl", "--baseline", "base"], "--baseline says nothing without --compare"),
    (["--compare", "base"], "--compare has one operand (base), and it takes two or more"),
    (["--compare", "base", "base"], "--compare has base twice"),
    (["--compare", "base", "{tmp}/none"], "--compare {tmp}/none: there is no such file or folder"),
    (["--compare", "base", "{root}/lora", "--output_dir", "{tmp}/out"], "--data_path is missing"),
    (["--compare", "{tmp}/good.jsonl", "{tmp}/other.jsonl"], "--output_dir is missing"),
    (["--compare", "{tmp}/good.jsonl", "{tmp}/other.jsonl", "--output_dir", "{tmp}/out"], "and 0 are the same"),
    (["--compare", "{root}/model", "base", "+"], "{root}/model: there is no LoRA and no prefix of P-Tuning v2 in it"),
    (["--compare", "{tmp}/lora", "base", "+"], "{tmp}/lora: the adapter was trained on a base of 99 layers"),
    (["--compare", "{tmp}/good.jsonl", "base", "+"], "--data_path has 13 prompts with their references, good has 1"),
    (["--compare", "base", "{root}/lora", "--baseline", "x", "+"], "--baseline x is none of those that are compared"),
    (["--compare", "base", "{root}/lora", "--lora_checkpoint", "x", "+"], "changes nothing beside --compare"),
    (["--lora_checkpoint", "{root}/lora"], "--data_path is missing"),
    (["--lora_checkpoint", "{root}/prefix", "+"], "Give it with --ptuning_checkpoint"),
    ([], "--data_path is missing"),
]


@pytest.mark.parametrize(("argv", "says"), BAD, ids=[" ".join(argv) or "nothing" for argv, _ in BAD])
def test_mistakes_are_refused_before_anything_is_loaded_or_written(place, tmp_path, monkeypatch, capsys, argv, says):
    (tmp_path / "good.jsonl").write_text(rows_with({}), encoding="utf-8")
    (tmp_path / "other.jsonl").write_text(rows_with({"prompt": "q"}), encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text(rows_with({}) + "{\n", encoding="utf-8")
    (tmp_path / "no-references.jsonl").write_text(rows_with({"references": []}), encoding="utf-8")
    adapter = shutil.copytree(place.lora, tmp_path / "lora")
    manifest = json.loads((adapter / "chatglm_tuning.json").read_text(encoding="utf-8"))
    manifest["base_model"]["num_layers"] = 99
    (adapter / "chatglm_tuning.json").write_text(json.dumps(manifest), encoding="utf-8")
    monkeypatch.setattr(chatglm_tuning.loading, "load_base", None)
    before = sorted((*tmp_path.rglob("*"), *place.root.rglob("*")))
    words = [word.replace("{root}", str(place.root)).replace("{tmp}", str(tmp_path)) for word in argv]
    if "+" in words:
        words = [*words[:-1], *place.flags(tmp_path / "out")]
    assert run_command("eval", words) == 2
    captured = capsys.readouterr()
    assert says.replace("{root}", str(place.root)).replace("{tmp}", str(tmp_path)) in captured.err
    assert captured.err.count("error: ") == 1
    assert captured.out == ""
    assert sorted((*tmp_path.rglob("*"), *place.root.rglob("*"))) == before


def test_a_missing_extra_is_named_before_anything_is_loaded(place, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert run_command("eval", place.flags(tmp_path / "out")) == 2
    assert 'pip install "chatglm-tuning[eval]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_fit_a_narrow_terminal(compared, capsys):
    from chatglm_tuning.evaluation.compare import System, compare
    from chatglm_tuning.evaluation.report import differences_table, scores_table

    rows = [Answered(f"p{index}", *row[:1], (row[1],)) for index, row in enumerate(pairs(14)[12:])]
    found = compare([System("one", tuple(rows)), System("other", tuple(rows))], "each", "other")
    console = Console(width=80)
    with console.capture() as capture:
        console.print(scores_table([found]))
        console.print(differences_table(found))
    assert max(map(len, capture.get().splitlines())) <= 80
