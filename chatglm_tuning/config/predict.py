"""The settings of `chatglm-tuning predict`, from the command line to frozen arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from chatglm_tuning.config.arguments import (
    DEFAULT_SEED,
    ChatArguments,
    DataArguments,
    ModelArguments,
    PtuningArguments,
    Setting,
    settings_of,
)
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.sources import Registry, resolve_flags
from chatglm_tuning.config.values import Value
from chatglm_tuning.errors import UserError

_CHAT = {setting.name: setting for setting in settings_of(ChatArguments)}
_DATA = {setting.name: setting for setting in settings_of(DataArguments)}
_PREFIX = next(setting for setting in settings_of(PtuningArguments) if setting.name == "ptuning_checkpoint")

DATA_PATH = Setting("data_path", Value("paths"), "one or more files with the prompts and their references", None)
OUTPUT_DIR = Setting("output_dir", Value("path"), "the folder that the results are written to", None)
OVERWRITE = Setting("overwrite", Value("boolean"), "give up what another run has left in output_dir", False)
BATCH_SIZE = Setting("batch_size", Value("integer", at_least=1), "prompts that are answered at the same time", 8)
_DO_SAMPLE = Setting("do_sample", Value("boolean"), "draw the tokens, instead of always taking the likeliest", False)
_TEMPERATURE = replace(
    _CHAT["temperature"],
    value=replace(_CHAT["temperature"].value, hint="To always take the likeliest token, leave out --do_sample"),
)
_TOP_K = Setting("top_k", Value("integer", at_least=0), "draw from that many likeliest tokens; 0: from all", 50)
_SEED = Setting("seed", _CHAT["seed"].value, "with --do_sample: the same seed draws the same answers", DEFAULT_SEED)
_ONLY_SAMPLING = ("temperature", "top_p", "top_k")

ADAPTER_GROUP = FlagGroup("adapter (without one the base answers)", (_CHAT["lora_checkpoint"], _PREFIX))
ANSWER_GROUPS = (
    FlagGroup(
        "data",
        (DATA_PATH, *(_DATA[name] for name in ("max_input_length", "max_output_length", "skip_bad_rows"))),
    ),
    FlagGroup("answers", (BATCH_SIZE, _DO_SAMPLE, _TEMPERATURE, _CHAT["top_p"], _TOP_K, _SEED)),
)

_IN_THE_FOLDER = "Leave it out: it is read from the folder of --ptuning_checkpoint"
ELSEWHERE = {
    "pre_seq_len": _IN_THE_FOLDER,
    "prefix_projection": _IN_THE_FOLDER,
    "greedy": "Leave it out: the likeliest token is taken unless --do_sample is given",
    "eval_path": "Give the files with --data_path",
    "per_device_eval_batch_size": "Give --batch_size",
    "max_length": "Give --max_input_length and --max_output_length",
    "max_new_tokens": "Give --max_output_length",
    "num_beams": "There is no beam search: leave it out",
    **dict.fromkeys(("predict_samples", "metric_for_best_model"), "It belongs to training: leave it out here"),
}
"""Flags of other commands that are looked for here, and what to do instead."""


@dataclass(frozen=True)
class AnswerArguments:
    """Whose prompts are answered, and how.

    max_input_length, max_output_length: tokens of a prompt with [gMASK], and of an answer with <sop> and <eop>.
    temperature, top_p, top_k, seed: used only with do_sample.
    """

    data_path: tuple[Path, ...]
    max_input_length: int = DataArguments.max_input_length
    max_output_length: int = DataArguments.max_output_length
    skip_bad_rows: bool = DataArguments.skip_bad_rows
    batch_size: int = BATCH_SIZE.default
    do_sample: bool = _DO_SAMPLE.default
    temperature: float = ChatArguments.temperature
    top_p: float = ChatArguments.top_p
    top_k: int = _TOP_K.default
    seed: int = _SEED.default


@dataclass(frozen=True)
class AdapterArguments:
    """The one adapter that is put into the base."""

    folder: Path
    method: Literal["lora", "ptuning"]


@dataclass(frozen=True)
class PredictArguments:
    """One run of `predict`. adapter: None for the base alone. overwrite: give up another run's result."""

    model: ModelArguments
    answers: AnswerArguments
    output_dir: Path
    adapter: AdapterArguments | None = None
    overwrite: bool = OVERWRITE.default


def parse_predict_arguments(argv: Sequence[str]) -> PredictArguments:
    """Return what `argv` (without the program's name) asks for; prints and raises as training does."""
    groups = [
        FlagGroup("model", tuple(settings_of(ModelArguments))),
        ADAPTER_GROUP,
        *ANSWER_GROUPS,
        FlagGroup("output", (OUTPUT_DIR, OVERWRITE)),
    ]
    parser = build_parser("chatglm-tuning predict", "Answer the prompts of data files.", groups)
    registry = Registry.of([setting for group in groups for setting in group.settings], {})
    values = resolve_flags(read_flags(parser, argv, ELSEWHERE), registry)
    check_given(values, DATA_PATH, OUTPUT_DIR)
    return PredictArguments(
        model=model_arguments(values),
        answers=answer_arguments(values),
        output_dir=values["output_dir"],
        adapter=adapter_arguments(values),
        overwrite=values.get("overwrite", OVERWRITE.default),
    )


def check_given(values: Mapping[str, Any], *needed: Setting) -> None:
    """Raise UserError where one of `needed` was not given."""
    for setting in needed:
        if setting.name not in values:
            raise UserError(f"--{setting.name} is missing", code="A104", remedy=f"Give {setting.help}")


def model_arguments(values: Mapping[str, Any]) -> ModelArguments:
    """Return the base among the settings of a command."""
    return ModelArguments(
        **{setting.name: values[setting.name] for setting in settings_of(ModelArguments) if setting.name in values}
    )


def adapter_arguments(values: Mapping[str, Any]) -> AdapterArguments | None:
    """Return the adapter among the settings of a command; raises UserError where there are two."""
    if "lora_checkpoint" in values and "ptuning_checkpoint" in values:
        raise UserError(
            "--lora_checkpoint and --ptuning_checkpoint are both given", code="A105", remedy="Give one adapter a run"
        )
    if "lora_checkpoint" in values:
        return AdapterArguments(values["lora_checkpoint"], "lora")
    return AdapterArguments(values["ptuning_checkpoint"], "ptuning") if "ptuning_checkpoint" in values else None


def answer_arguments(values: Mapping[str, Any]) -> AnswerArguments:
    """Return how answers are drawn; raises UserError for a setting of drawing where nothing is drawn."""
    for name in _ONLY_SAMPLING:
        if name in values and not values.get("do_sample"):
            raise UserError(
                f"--{name} changes nothing where the likeliest token is taken",
                code="A106",
                remedy="Add --do_sample, or leave it out",
            )
    names = {field.name for field in fields(AnswerArguments)}
    return AnswerArguments(**{name: value for name, value in values.items() if name in names})
