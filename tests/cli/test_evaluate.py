"""`eval` as users run it: scores of files, of a model, of several compared, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

import chatglm_tuning.loading
from chatglm_tuning.checkpoint import digest_tensors, read_lora, read_prefix
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.config.evaluate import parse_eval_arguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.compare import AnsweredBy
from chatglm_tuning.evaluation.evaluate import read_predictions
from chatglm_tuning.evaluation.metrics import Answered, row_scores, score_all
from chatglm_tuning.export.scores import read_scores
from chatglm_tuning.loading import read_identity
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


def test_scores_say_which_adapter_and_base_they_are_of(place, compared, tmp_path, caplog):
    systems = scores(compared)["systems"]
    base = read_identity(str(place.model)).fingerprint
    adapters = [digest_tensors(read_lora(place.lora)), digest_tensors(read_prefix(place.prefix)[1]), None]
    found = [facts["answered_by"] for facts in systems.values()]
    assert found == [{"adapter": adapter, "base": base} for adapter in adapters]
    path = compared / next(iter(systems)) / "predictions.jsonl"
    copy = write_predictions(tmp_path / "predictions.jsonl", [("a", "b")])
    assert run_command("eval", ["--predictions", str(path), str(copy), "--output_dir", str(tmp_path / "out")]) == 0
    assert [facts["answered_by"] for facts in scores(tmp_path / "out")["systems"].values()] == [found[0], None]
    (tmp_path / "predictions_meta.json").write_bytes((path.parent / "predictions_meta.json").read_bytes())
    assert read_predictions("other bytes than the file beside it says", copy).answered_by is None
    # What export takes for its card, and no more once the adapter is another one.
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copyfile(compared / "scores.json", folder / "scores.json")
    card = read_scores(None, folder, None, AnsweredBy(adapters[0], base))
    assert {name.split(":")[0] for name, _ in card.rows} == {next(iter(systems)), "base"}
    assert not read_scores(None, folder, None, AnsweredBy("trained again", base)).rows
    assert "none of this adapter as it is now" in caplog.text


def test_scores_of_predictions_of_an_earlier_version_come_to_say_whose_they_are(place, compared, tmp_path, monkeypatch):
    """By what `export` says that helps, in the words of its remedy."""
    wanted = AnsweredBy(digest_tensors(read_lora(place.lora)), read_identity(str(place.model)).fingerprint)
    folder = shutil.copytree(compared / "lora", tmp_path / "earlier")
    meta = json.loads((folder / "predictions_meta.json").read_text(encoding="utf-8"))
    del meta["answered_by"]
    (folder / "predictions_meta.json").write_text(json.dumps(meta), encoding="utf-8")
    monkeypatch.setattr(chatglm_tuning.loading, "load_base", None)
    scoring = ["--predictions", str(folder / "predictions.jsonl"), "--output_dir", str(tmp_path / "scores")]
    assert run_command("eval", scoring) == 0
    path = tmp_path / "scores" / "scores.json"
    with pytest.raises(UserError, match="does not say which adapter") as refused:
        read_scores(path, place.lora, None, wanted)
    assert "predict gave the answers, run that again, which keeps them, then the same eval" in str(refused.value)
    assert run_command("predict", place.flags(folder, "--lora_checkpoint", place.lora)) == 0
    assert run_command("eval", scoring) == 0
    assert read_scores(path, place.lora, None, wanted).rows


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
    assert content["in_picture"] == {"lora": "lora", "prefix": "prefix", "base": "base"}
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
    assert run_command("eval", argv) == 0
    assert {path: path.read_bytes() for path in compared.rglob("*") if path.is_file()} == before
    assert run_command("eval", [*argv, "--baseline", "lora", "--overwrite"]) == 0
    assert "differences from lora" in capsys.readouterr().out
    assert run_command("eval", [*argv, "--overwrite"]) == 0
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
    assert "no: equal" in row
    assert "yes: worse" in row


def test_operands_of_one_name_are_told_apart(tmp_path):
    rows = pairs(5)
    one = write_predictions(tmp_path / "a" / "x" / "predictions.jsonl", rows)
    other = write_predictions(tmp_path / "b" / "x" / "predictions.jsonl", rows)
    third = write_predictions(tmp_path / "c.jsonl", rows)
    argv = ["--compare", str(one), str(other), str(third), "--output_dir", str(tmp_path / "out")]
    assert [operand.name for operand in parse_eval_arguments(argv).compare] == [str(one), str(other), "c"]


def test_operands_never_share_a_folder(tmp_path, monkeypatch):
    folders = ["a/b/lora", "a-b/lora", "c/lora", "c/LoRA2", "c/lora2", "d/scores.json", "d/base", "../lora"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in folders:
        (tmp_path / "here" / folder).mkdir(parents=True)
    argv = ["--compare", *folders, "base", "--output_dir", "out", "--data_path", "x"]
    found = {operand.name: operand.folder for operand in parse_eval_arguments(argv).compare}
    assert len(found) == len({folder.casefold() for folder in found.values()}) == len(folders) + 1
    assert found["base"] == "base"
    assert found["a/b/lora"].startswith("a-b-lora-")
    assert found["a-b/lora"].startswith("a-b-lora-")
    assert found["d/base"] == "d-base"
    assert found["scores.json"].startswith("scores.json-")
    again = {operand.name: operand.folder for operand in parse_eval_arguments(argv).compare}
    assert again == found


def rows_with(change):
    row = {"prompt": "p", "references": ["r"], "prediction": "x"}
    return json.dumps({**row, **change}) + "\n"


BAD = [
    (["--predictions", "{tmp}/none.jsonl"], "{tmp}/none.jsonl: there is no such file"),
    (["--predictions", "{root}"], "{root}: this is a folder, not a file"),
    (["--predictions", "{root}/rows.jsonl"], '{root}/rows.jsonl:1: "prediction" is missing, or no string'),
    (["--predictions", "{tmp}/broken.jsonl"], "{tmp}/broken.jsonl:2: not JSON"),
    (["--predictions", "{tmp}/no-references.jsonl"], '{tmp}/no-references.jsonl:1: "references" is empty: there'),
    (["--predictions", "{tmp}/no-references.jsonl"], "1 bad row in all. The data rows of these prompts have no answer"),
    (["--predictions", "{tmp}/bytes.jsonl"], '{tmp}/bytes.jsonl:1: "prediction" is not valid UTF-8 text'),
    (["--predictions", "{tmp}/surrogate.jsonl"], '{tmp}/surrogate.jsonl:1: "prompt" is not valid UTF-8 text'),
    (["--predictions", "{tmp}/reference.jsonl"], "1 bad row in all. Give files as chatglm-tuning predict writes them"),
    (["--predictions", "{tmp}/good.jsonl", "{tmp}/good.jsonl"], "--predictions has {tmp}/good.jsonl twice. Give each"),
    (["--predictions", "{tmp}/good.jsonl", "{tmp}/./x/../good.jsonl"], "good.jsonl twice, also as {tmp}/x/../good"),
    (["--predictions", "{tmp}/good.jsonl", "--data_path", "x"], "--data_path changes nothing where --predictions are"),
    (["--predictions", "{tmp}/good.jsonl", "--compare", "base"], "--predictions and --compare are both given"),
    (["--predictions", "{tmp}/good.jsonl", "--references", "all"], "--references must be each or best"),
    (["--predictions", "{tmp}/good.jsonl", "--output_dir", "{tmp}/good.jsonl"], "output_dir is a file"),
    (["--predictions", "{tmp}/good.jsonl", "--baseline", "base"], "--baseline says nothing without --compare"),
    (["--compare", "base"], "--compare has one operand (base), and it takes two or more"),
    (["--compare", "base", "base"], "--compare has base twice"),
    (["--compare", "{root}/lora", "base", "{root}/lora/"], "--compare has {root}/lora twice, also as {root}/lora/"),
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
    ([], "--data_path is missing, and so are --predictions and --compare. Give --predictions to score files"),
    (["--predict_samples", "3"], "--predict_samples is no flag of chatglm-tuning eval. It belongs to training"),
    (["--data_path", "{tmp}/prompts.jsonl", "+1"], '{tmp}/prompts.jsonl:1: "summary" is missing'),
    (["--data_path", "x"], "--output_dir is missing. Give the folder that the results are written to"),
    (["--compare", "base", "{root}/lora", "--output_dir", "x"], "Give one or more files with the prompts and their"),
]


@pytest.mark.parametrize(("argv", "says"), BAD, ids=[" ".join(argv) or "nothing" for argv, _ in BAD])
def test_mistakes_are_refused_before_anything_is_loaded_or_written(place, tmp_path, monkeypatch, capsys, argv, says):
    (tmp_path / "good.jsonl").write_text(rows_with({}), encoding="utf-8")
    (tmp_path / "other.jsonl").write_text(rows_with({"prompt": "q"}), encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text(rows_with({}) + "{\n", encoding="utf-8")
    (tmp_path / "no-references.jsonl").write_text(rows_with({"references": []}), encoding="utf-8")
    (tmp_path / "bytes.jsonl").write_bytes(rows_with({"prediction": "@"}).encode().replace(b"@", b"a\xff"))
    (tmp_path / "surrogate.jsonl").write_text(rows_with({"prompt": "c\ud800"}), encoding="utf-8")
    (tmp_path / "reference.jsonl").write_text(rows_with({"references": ["a", "\udfff"]}), encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"content": "a"}\n', encoding="utf-8")
    adapter = shutil.copytree(place.lora, tmp_path / "lora")
    manifest = json.loads((adapter / "chatglm_tuning.json").read_text(encoding="utf-8"))
    manifest["base_model"]["num_layers"] = 99
    del manifest["sha256"]
    (adapter / "chatglm_tuning.json").write_text(json.dumps(manifest), encoding="utf-8")
    monkeypatch.setattr(chatglm_tuning.loading, "load_base", None)
    before = sorted((*tmp_path.rglob("*"), *place.root.rglob("*")))
    words = [word.replace("{root}", str(place.root)).replace("{tmp}", str(tmp_path)) for word in argv]
    if "+" in words:
        words = [*words[:-1], *place.flags(tmp_path / "out")]
    elif "+1" in words:
        words = ["--model_name_or_path", str(place.model), *words[:-1], "--output_dir", str(tmp_path / "out")]
    assert run_command("eval", words) == 2
    captured = capsys.readouterr()
    assert says.replace("{root}", str(place.root)).replace("{tmp}", str(tmp_path)) in captured.err
    assert captured.err.count("error [") == 1
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


def refused(argv, capsys):
    assert run_command("eval", list(map(str, argv))) == 2
    return capsys.readouterr().err


def test_the_scores_of_another_evaluation_are_not_overwritten_unless_asked(tmp_path, capsys):
    rows = pairs(20)[12:]
    one, other = (write_predictions(tmp_path / f"{name}.jsonl", rows) for name in ("one", "other"))
    out = tmp_path / "out"
    argv = ["--compare", one, other, "--output_dir", out]
    assert run_command("eval", list(map(str, argv))) == 0
    assert f"picture: {out / 'comparison.png'}\n" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for given, says in [
        (["--predictions", one, "--output_dir", out], "baseline was other and is now None; of one, other). Give"),
        ([*argv, "--references", "best"], "references was each and is now best"),
        ([*argv, "--baseline", "one"], "baseline was other and is now one"),
        (["--compare", other, one, "--output_dir", out], "of one, other)"),
    ]:
        message = refused(given, capsys)
        assert f"{out}: it holds the scores of another evaluation (" in message
        assert says in message
        assert message.endswith("or --overwrite to give them up. (chatglm-tuning doctor O105 explains)\n")
    assert run_command("eval", list(map(str, argv))) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    write_predictions(one, rows[:-1])
    write_predictions(other, rows[:-1])
    assert "one, other had other answers" in refused(argv, capsys)
    alone = ["--predictions", str(one), "--output_dir", str(out)]
    assert run_command("eval", [*alone, "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["prompt_scores.jsonl", "scores.json"]  # no stale picture
    assert "picture" not in capsys.readouterr().out
    (out / "scores.json").write_bytes(b"\xff{")
    assert "its scores.json does not say of what" in refused(alone, capsys)


def test_an_evaluation_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    from chatglm_tuning.evaluation import files

    path = write_predictions(tmp_path / "mine.jsonl", pairs(5))
    argv = ["--predictions", str(path), "--output_dir", str(tmp_path / "out")]
    assert run_command("eval", argv) == 0
    before = {found.name: found.read_bytes() for found in (tmp_path / "out").iterdir()}
    written = []

    def fail_at_the_second(path):
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "fsync", fail_at_the_second)
    assert run_command("eval", [*argv, "--references", "best", "--overwrite"]) == 2
    assert "the results cannot be written (No space left on device)" in capsys.readouterr().err
    assert {found.name: found.read_bytes() for found in (tmp_path / "out").iterdir()} == before


def test_what_was_cut_is_said_and_one_is_no_plural(place, tmp_path, capsys, caplog):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"content": "很" * 30, "summary": "好" * 30}) + "\n", encoding="utf-8")
    flags = place.flags(tmp_path / "out", "--max_output_length", "4")
    flags[flags.index("--data_path") + 1] = str(rows)
    flags[flags.index("--max_input_length") + 1] = "10"
    with caplog.at_level("INFO"):
        assert run_command("eval", flags) == 0
    assert "1 of 1 prompt was cut to max_input_length 10" in caplog.text
    assert "measuring the loss: 1 row in" in caplog.text
    assert "scoring: 1 answer in" in caplog.text
    printed = capsys.readouterr().out
    assert "base: 1 row of 1 prompt; 1 of 1 prompt was cut to max_input_length; 1 answer was cut off by" in printed
    assert scores(tmp_path / "out")["systems"]["base"]["cut_prompts"] == 1
    assert json.loads((tmp_path / "out" / "predictions_meta.json").read_text(encoding="utf-8"))["cut_prompts"] == 1


def change_base(adapter, **facts):
    """Let the manifest of a folder say something else of the base that its adapter was trained on."""
    manifest = json.loads((adapter / "chatglm_tuning.json").read_text(encoding="utf-8"))
    manifest["base_model"] |= facts
    del manifest["sha256"]
    (adapter / "chatglm_tuning.json").write_text(json.dumps(manifest), encoding="utf-8")
    return adapter


def test_another_precision_than_the_adapter_was_trained_on_is_said(place, tmp_path, caplog):
    adapter = change_base(shutil.copytree(place.lora, tmp_path / "int4"), quantization_bit=4)
    says = (
        f"{adapter} was trained on a base in int4 and is used on one in full precision: to have it answer as it was "
        "trained, give --quantization_bit 4"
    )
    # The second time, all that needs a model is there already.
    for command, loads in (("predict", 1), ("predict", 0), ("eval", 1), ("eval", 0)):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert run_command(command, place.flags(tmp_path / "out", "--lora_checkpoint", adapter)) == 0
        told = [says in message or "GiB read in" in message for message in caplog.messages]
        assert sum(told) == 1 + loads
        assert says in caplog.messages[told.index(True)], "it is said before the load"
    caplog.clear()
    with caplog.at_level("INFO"):
        flags = place.flags(tmp_path / "out4", "--quantization_bit", 4, "--lora_checkpoint", adapter)
        assert run_command("eval", flags) == 0
    assert "was trained on a base" not in caplog.text


def test_of_several_adapters_all_is_said_of_their_bases_before_the_first_answers(place, tmp_path, caplog):
    precision = change_base(shutil.copytree(place.lora, tmp_path / "int8"), quantization_bit=8)
    another = change_base(shutil.copytree(place.prefix, tmp_path / "another"), fingerprint="0" * 64)
    argv = ["--compare", str(precision), str(another), "base", *place.flags(tmp_path / "out")]
    for loads in (1, 0):
        caplog.clear()
        with caplog.at_level("INFO"):
            assert run_command("eval", argv) == 0
        told = [text for text in caplog.messages if "was trained on" in text or "GiB read in" in text]
        assert len(told) == 2 + loads
        assert told[0].startswith(f"{precision} was trained on a base in int8")
        assert told[1].startswith(f"{another} was trained on another base model")


def test_a_prefix_beside_the_base_is_noted_once(place, tmp_path, caplog):
    model = shutil.copytree(place.model, tmp_path / "model")
    shard = model / "pytorch_model-00001-of-00002.bin"
    state = torch.load(shard, weights_only=True)
    torch.save(state | {"transformer.prefix_encoder.embedding.weight": torch.ones(2, 8)}, shard)
    flags = place.flags(tmp_path / "out", "--lora_checkpoint", place.lora)
    flags[flags.index("--model_name_or_path") + 1] = str(model)
    assert run_command("predict", flags) == 0
    assert caplog.text.count("holds a prefix beside the base model, which is left out") == 1


def test_an_interrupted_measurement_says_how_it_goes_on(place, tmp_path, monkeypatch, caplog):
    from chatglm_tuning.evaluation import loss

    flags = place.flags(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(loss, "_row_losses", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_command("eval", flags) == 130
    assert "interrupted while the loss of base was measured; the same command goes on with it" in caplog.text
    assert run_command("eval", flags) == 0
    (tmp_path / "out" / "loss.json").write_text(
        json.dumps(json.loads((tmp_path / "out" / "loss.json").read_text(encoding="utf-8")) | {"sums": [1.0]}),
        encoding="utf-8",
    )
    before = scores(tmp_path / "out")
    assert run_command("eval", flags) == 0  # damaged losses are measured anew
    assert scores(tmp_path / "out") == before
