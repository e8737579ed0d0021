"""The demo's commands, its judgement of an answer, its tables and its picture; the demo itself is `make demo`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from adverts import SHOWN_PROMPTS, generate_adverts
from corpus import corpus_pairs
from demo import (
    SHOWN,
    Model,
    Scores,
    Setup,
    answers_table,
    closing,
    compare_with_untuned,
    compared_models,
    draw_losses,
    interval_tables,
    is_advert,
    parse_arguments,
    results_content,
    score,
    scores_table,
    training_commands,
)
from rich.console import Console

from chatglm_tuning.config.parsing import parse_chat_arguments, parse_train_arguments
from chatglm_tuning.evaluation.compare import System
from chatglm_tuning.evaluation.metrics import Answered
from chatglm_tuning.training.callbacks import LOG_NAME
from tests.conftest import REPOSITORY


@pytest.fixture
def setup() -> Setup:
    return parse_arguments([])


def printed(renderable) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_commands_are_what_the_parsers_take(setup, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    commands = training_commands(setup)
    lora = parse_train_arguments("lora", commands["lora"][1:])
    prefix = parse_train_arguments("ptuning", commands["ptuning-int4"][1:])
    assert commands["lora"][0] == "train_lora.py"
    assert commands["ptuning-int4"][0] == "train_ptuning.py"
    assert (lora.method, lora.lora.lora_rank, lora.model.quantization_bit) == ("lora", 8, None)
    assert (prefix.method, prefix.model.quantization_bit) == ("ptuning", 4)
    for run, name in ((lora, "lora"), (prefix, "ptuning-int4")):
        assert run.trainer.output_dir == Path("output/demo") / name
        assert run.options.overwrite_output_dir
        assert run.model.model_name_or_path == "embedded/chatglm-tiny"
        assert all(path.is_file() for path in (*run.data.data_path, *run.data.eval_path))


def test_arguments_reach_the_commands(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    setup = parse_arguments(["--base", "some/base", "--output", "some/where", "--max-steps", "3", "--dev-prompts", "7"])
    assert setup == Setup(Path("some/base"), Path("some/where"), dev_prompts=7, max_steps=3)
    run = parse_train_arguments("lora", training_commands(setup)["lora"][1:])
    assert run.trainer.output_dir == Path("some/where/lora")
    assert run.trainer.values["max_steps"] == 3
    assert run.model.model_name_or_path == "some/base"


def test_each_adapter_is_compared_with_the_base_it_was_tuned_on():
    models = compared_models(Path("out"))
    assert [model.quantization_bit for model in models] == [None, None, 4, 4]
    assert [bool(model.lora_checkpoint or model.ptuning_checkpoint) for model in models] == [False, True, False, True]


def test_adverts_and_lists_are_told_apart():
    for row in generate_adverts(50, seed=9):
        assert is_advert(row["content"], row["summary"]), row
    lists = [(prompt, answer) for prompt, answer in corpus_pairs(300, seed=9) if prompt.startswith("类型#")]
    assert len(lists) > 50
    assert not [pair for pair in lists if is_advert(*pair)]
    assert not is_advert("类型#裤*版型#宽松", "")
    assert not is_advert("类型#裤*版型#宽松", "你好！")


def test_answers_and_losses_of_a_model(setup):
    scores, system = score(Model("untuned"), replace(setup, dev_prompts=3))
    assert len(scores.shown) == len(SHOWN)
    assert [answered.prompt for answered in system.answers] == [row["content"] for row in dev_rows(3)]
    assert [answered.references for answered in system.answers] == [(row["summary"],) for row in dev_rows(3)]
    assert len(system.losses.tokens) == 3
    assert scores.dev_loss != pytest.approx(system.losses.per_token)  # of all of dev
    assert scores.coverage > 0.9
    assert scores.adverts == 0


def dev_rows(count):
    lines = (REPOSITORY / "data" / "AdvertiseGen" / "sample_dev.json").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def test_what_was_tuned_is_compared_with_its_base():
    rows = dev_rows(6)

    def system(name, length):
        answers = [Answered(row["content"], row["summary"][:length], (row["summary"],)) for row in rows]
        return System(name, tuple(answers))

    systems = [system("untuned", 5), system("LoRA", 60), system("untuned int4", 7), system("P-Tuning v2 int4", 40)]
    comparisons = compare_with_untuned(systems)
    tables = [printed(table) for table in interval_tables(comparisons)]
    assert len(tables) == 3
    assert all(name in tables[0] for name in ("untuned", "LoRA", "untuned int4", "P-Tuning v2 int4", "rouge-l"))
    assert "differences from untuned int4" in tables[2]
    assert "yes: better" in tables[1]
    results = [Scores(found.name, 1.0, 1.0, 1.0, []) for found in systems]
    content = json.loads(json.dumps(results_content(results, comparisons)))
    assert content[0]["differences"] == {}
    gap = content[1]["differences"]["rouge-l"]
    assert gap["value"] == pytest.approx(
        content[1]["metrics"]["rouge-l"]["value"] - content[0]["metrics"]["rouge-l"]["value"]
    )
    assert 0 < gap["low"] <= gap["value"] <= gap["high"]


def test_the_tables_hold_answers_and_scores():
    results = [
        Scores("untuned", 4.5678, 0.95, 0.0, ["一", "二", "三"]),
        Scores("LoRA", 1.2345, 0.9, 0.875, ["四", "五", "六"]),
    ]
    answers = printed(answers_table(results))
    assert all(word in answers for word in ("untuned", "LoRA", "一", "六", "版型#宽松"))
    scores = printed(scores_table(results, 100))
    assert all(word in scores for word in ("4.568", "1.234", "95%", "88%", "0%", "100 greedy answers"))


def test_the_shown_prompts_are_those_kept_out_of_the_data():
    assert list(SHOWN_PROMPTS[:3]) == list(SHOWN)


def test_one_picture_holds_every_run(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / LOG_NAME).write_text(text, encoding="utf-8")
    picture = tmp_path / "loss.png"
    draw_losses({"one": tmp_path / "a", "other": tmp_path / "b"}, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_chat_commands_it_ends_with_are_what_chat_takes(setup):
    commands = [line.split()[2:] for line in closing(setup).splitlines() if "cli_demo.py" in line]
    lora, prefix = (parse_chat_arguments(command) for command in commands)
    assert lora.lora_checkpoint == Path("output/demo/lora")
    assert prefix.ptuning.ptuning_checkpoint == Path("output/demo/ptuning-int4")
    assert prefix.model.quantization_bit == 4
    assert not lora.history
    assert not prefix.history
