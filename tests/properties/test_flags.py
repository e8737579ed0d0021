"""Any valid combination of training flags runs one step, or is refused before the base model is loaded.

The flags and their values are drawn from the settings themselves, so that a new one is tried without a line here.
"""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chatglm_tuning.training.run as recipe
from chatglm_tuning.checkpoint import read_manifest
from chatglm_tuning.config.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    PtuningArguments,
    RunOptions,
    Setting,
    settings_of,
)
from chatglm_tuning.config.parsing import parse_train_arguments
from chatglm_tuning.config.training_arguments import TRAINER_FLAGS, TRAINING_ARGUMENTS
from chatglm_tuning.config.values import Value
from chatglm_tuning.errors import UserError
from chatglm_tuning.training.trainer import TuningTrainer
from tests.model_folder import write_rows, write_tiny_model
from tests.properties.texts import examples

# Given by every case, or of a machine that this one is not.
GIVEN = {"model_name_or_path", "data_path", "output_dir", "max_steps", "seed"}
ELSEWHERE = {
    "data_cache_dir": "every case has one of its own",
    "resume_from_checkpoint": "tests/training/test_resume.py",
    "deepspeed": "needs DeepSpeed: tests/training/test_distributed.py",
    "local_rank": "written by a launcher",
    "report_to": "other packages write the curves",
    "dataloader_num_workers": "starts processes",
    "preprocessing_num_workers": "starts processes",
}
# Where the range of a setting is much wider than what one step of a tiny model can show.
NEARER = {
    "learning_rate": st.floats(1e-6, 1e-3),
    "adam_epsilon": st.floats(1e-9, 1e-6),
    "weight_decay": st.floats(0, 0.1),
    "num_train_epochs": st.floats(0.1, 3),
    "max_grad_norm": st.floats(0, 2),
    "metric_for_best_model": st.sampled_from(["loss", "eval_loss", "rouge-l", "bleu-4", "nothing"]),
    "optim": st.sampled_from(["adamw_torch", "adafactor", "sgd", "rmsprop", "lomo", "adamw_bnb_8bit", "galore_adamw"]),
    "max_input_length": st.integers(4, 200),
    "max_output_length": st.integers(4, 200),
    "lora_rank": st.integers(1, 6),
    "max_tokens_per_batch": st.integers(8, 400),
    "pre_seq_len": st.integers(1, 5),
    "predict_samples": st.integers(0, 2),
}


def of_script(script: str) -> list[Setting]:
    """Every setting that the command has as a flag."""
    own = LoraArguments if script == "lora" else PtuningArguments
    found = [setting for group in (ModelArguments, DataArguments, own, RunOptions) for setting in settings_of(group)]
    return found + [Setting(name, TRAINING_ARGUMENTS[name], text, None) for name, text in TRAINER_FLAGS.items()]


def values_of(setting: Setting, paths: dict[str, Path]) -> st.SearchStrategy[list[str]]:
    """What may follow the flag of `setting`."""
    if setting.name in paths:
        return st.just([str(paths[setting.name])])
    if setting.name in NEARER:
        return NEARER[setting.name].map(lambda value: [str(value)])
    return _by_kind(setting.value)


def _by_kind(value: Value) -> st.SearchStrategy[list[str]]:
    if value.kind == "names":
        return st.lists(st.sampled_from(value.choices), min_size=1, max_size=3, unique=True)
    if value.choices:
        return st.sampled_from(value.choices).map(lambda choice: [str(choice)])
    if value.kind == "boolean":
        return st.sampled_from([["true"], ["false"]])
    if value.kind == "integer":
        low = int(value.at_least if value.at_least is not None else 0)
        return st.integers(low, low + 3).map(lambda number: [str(number)])
    assert value.kind == "number", f"what may a {value.kind} be? Say it in NEARER, or why not in ELSEWHERE"
    low = value.at_least if value.at_least is not None else value.above or 0
    high = value.at_most if value.at_most is not None else value.below or low + 3
    numbers = st.floats(low, high, exclude_min=value.above is not None, exclude_max=value.below is not None)
    return st.one_of(numbers, st.integers(1, 3)).map(lambda number: [str(number)])


@st.composite
def flags(draw: st.DrawFn, script: str, paths: dict[str, Path]) -> list[str]:
    """Some flags of a command, each once."""
    drawn: list[str] = []
    usable = [setting for setting in of_script(script) if setting.name not in {*GIVEN, *ELSEWHERE}]
    # What decides over many others comes often enough.
    often = [s for s in usable if s.name in ("quantization_bit", "eval_path", "eval_strategy", "pre_seq_len")]
    chosen = draw(st.lists(st.sampled_from(usable), max_size=7)) + draw(st.lists(st.sampled_from(often), max_size=2))
    for setting in {setting.name: setting for setting in chosen}.values():
        if setting.off_flag is not None and draw(st.booleans()):
            drawn += [f"--{setting.off_flag}"]
        else:
            drawn += [f"--{setting.name}", *draw(values_of(setting, paths))]
    return drawn


@dataclass(frozen=True)
class Place:
    """What the cases share."""

    root: Path
    model: Path
    rows: Path

    @property
    def output(self) -> Path:
        return self.root / "output"

    def argv(self, drawn: Sequence[str]) -> list[str]:
        given = ["--model_name_or_path", str(self.model), "--data_path", str(self.rows), "--max_steps", "1"]
        cache = ["--data_cache_dir", str(self.root / "cache"), "--report_to", "none"]
        return [*given, *cache, "--output_dir", str(self.output), *drawn]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("flags")
    model = write_tiny_model(
        root / "model", num_layers=1, hidden_size=8, inner_hidden_size=16, max_sequence_length=2048
    )
    return Place(root, model, write_rows(root / "rows.json", 5))


@contextlib.contextmanager
def watched(monkeypatch):
    """A list that has `load` in it once the base is loaded, and `step` once a loss was computed."""
    done: list[str] = []
    load, compute = recipe.load_base, TuningTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "load_base", lambda *args, **kwargs: done.append("load") or load(*args, **kwargs))
        patch.setattr(
            TuningTrainer, "compute_loss", lambda *args, **kwargs: done.append("step") or compute(*args, **kwargs)
        )
        yield done


def run(script, drawn, place, monkeypatch) -> str:
    """Run a case; returns how it ended."""
    shutil.rmtree(place.output, ignore_errors=True)
    refusal = None
    with watched(monkeypatch) as done, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            recipe.train(parse_train_arguments(script, place.argv(drawn)))
        except UserError as error:
            refusal = error
    if refusal is not None:
        # What a step itself shows, nobody can tell before: a loss that is not finite, an adapter that changes nothing.
        assert done == [] or "step" in done, f"told only after the load: {refusal}"
        assert refusal.remedy
        return "told in the run" if done else "refused"
    assert {*done} == {"load", "step"}
    manifest = read_manifest(place.output)
    assert manifest is not None
    assert manifest.settings["steps"] == 1
    return "ran"


@pytest.mark.parametrize("script", ["lora", "ptuning"])
def test_any_flags_run_a_step_or_are_refused_before_the_load(script, place, monkeypatch):
    endings: list[str] = []
    paths = {"eval_path": place.rows, "ptuning_checkpoint": place.root / "none"}
    logging.disable(logging.WARNING)

    @given(drawn=flags(script, paths))
    @settings(examples(16), print_blob=False)
    def check(drawn):
        endings.append(run(script, drawn, place, monkeypatch))

    try:
        check()
    finally:
        logging.disable(logging.NOTSET)
    assert endings.count("ran") >= len(endings) // 10, "nearly all is refused, so this shows little"
    assert "refused" in endings, "nothing is refused, so this shows little"


@pytest.mark.parametrize("script", ["lora", "ptuning"])
def test_every_flag_of_the_command_is_drawn_or_left_out_for_a_reason(script):
    names = [setting.name for setting in of_script(script)]
    assert {*GIVEN, *ELSEWHERE} <= {*names}
    for setting in of_script(script):
        if setting.name not in {*GIVEN, *ELSEWHERE}:
            values_of(setting, {"eval_path": Path("a"), "ptuning_checkpoint": Path("b")})


def test_a_refusal_after_the_load_would_be_seen(place, monkeypatch):
    monkeypatch.setattr(
        recipe, "add_adapter", lambda *_: (_ for _ in ()).throw(UserError("late", code="A114", remedy="none"))
    )
    with pytest.raises(AssertionError, match="told only after the load: late"):
        run("lora", [], place, monkeypatch)
