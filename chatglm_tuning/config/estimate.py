"""The settings of `chatglm-tuning estimate`, from the command line to frozen arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from chatglm_tuning.config.arguments import (
    LORA_TARGETS,
    DataArguments,
    LoraArguments,
    Method,
    ModelArguments,
    PtuningArguments,
    Setting,
    settings_of,
)
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.sources import Registry, resolve_flags
from chatglm_tuning.config.training_arguments import TRAINER_FLAGS, TRAINING_ARGUMENTS
from chatglm_tuning.config.values import Value
from chatglm_tuning.errors import UserError

_BATCH = "per_device_train_batch_size"
_CHECKPOINTING = ("auto", "off", "mlp", "on")


@dataclass(frozen=True)
class EstimateArguments:
    """What the memory is estimated of.

    model: folder with config.json; None = the released sizes. data_path: None = every row as long as the limits allow.
    memory_gib: what is to hold it, None = only the sizes are asked for.
    """

    model: str | None
    method: Method = "lora"
    quantization_bit: Literal[4, 8] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch: int = 1
    max_input_length: int = DataArguments.max_input_length
    max_output_length: int = DataArguments.max_output_length
    data_path: Path | None = None
    lora_rank: int = LoraArguments.lora_rank
    lora_target: tuple[str, ...] = LoraArguments.lora_target
    pre_seq_len: int = 128
    prefix_projection: bool = False
    activation_checkpointing: Literal["auto", "off", "mlp", "on"] = "auto"
    memory_gib: float | None = None
    json: bool = False


def parse_estimate_arguments(argv: Sequence[str]) -> EstimateArguments:
    """Return what `argv` (without the program's name) asks for; prints and raises as training does."""
    groups = _groups()
    parser = build_parser("chatglm-tuning estimate", "Memory that tuning ChatGLM-6B needs, by part.", groups)
    registry = Registry.of([setting for group in groups for setting in group.settings], {})
    values = resolve_flags(read_flags(parser, argv, {}), registry)
    _check(values)
    if _BATCH in values:
        values["batch"] = values.pop(_BATCH)
    model = values.pop("model_name_or_path", ModelArguments.model_name_or_path)
    if "all" in values.get("lora_target", ()):
        values["lora_target"] = LORA_TARGETS
    released = model == ModelArguments.model_name_or_path
    return EstimateArguments(model=None if released else model, **values)


def _groups() -> list[FlagGroup]:
    defaults = {item.name: item.default for item in fields(EstimateArguments)}

    def own(name: str, value: Value, text: str) -> Setting:
        return Setting(name, value, text, defaults[name])

    def borrowed(arguments: type, *names: str) -> list[Setting]:
        return [setting for setting in settings_of(arguments) if setting.name in names]

    rows_per_batch = TRAINER_FLAGS[_BATCH]
    return [
        FlagGroup("model", tuple(settings_of(ModelArguments))),
        FlagGroup(
            "tuning",
            (
                own("method", Value("text", choices=("lora", "ptuning", "full")), "what is trained"),
                *borrowed(LoraArguments, "lora_rank", "lora_target"),
                own("pre_seq_len", Value("integer", at_least=1), "number of prefix positions"),
                *borrowed(PtuningArguments, "prefix_projection"),
                own("activation_checkpointing", Value("text", choices=_CHECKPOINTING), "what is recomputed"),
            ),
        ),
        FlagGroup(
            "data",
            (
                Setting(_BATCH, TRAINING_ARGUMENTS[_BATCH], rows_per_batch, None),
                own("batch", Value("integer", at_least=1), f"the same as --{_BATCH}"),
                *borrowed(DataArguments, "max_input_length", "max_output_length"),
                own("data_path", Value("path"), "file with training rows, whose lengths are taken"),
            ),
        ),
        FlagGroup(
            "answer",
            (
                own(
                    "memory_gib",
                    Value("number", above=0, at_most=10**6),
                    "say whether it fits, and which settings would",
                ),
                own("json", Value("boolean"), "print JSON, with all sizes in bytes"),
            ),
        ),
    ]


def _check(values: Mapping[str, Any]) -> None:
    """Raise UserError where settings do not go together."""
    if "batch" in values and _BATCH in values:
        raise UserError(f"--batch and --{_BATCH} are both given", code="A105", remedy="Keep one of the two")
    method = values.get("method", EstimateArguments.method)
    owners = {
        "lora_rank": "lora",
        "lora_target": "lora",
        "pre_seq_len": "ptuning",
        "prefix_projection": "ptuning",
    }
    for name, owner in owners.items():
        if name in values and method != owner:
            raise UserError(
                f"--{name} belongs to --method {owner}, and the method is {method}",
                code="A106",
                remedy=f"Leave it out, or give --method {owner}",
            )
    if method == "full" and "quantization_bit" in values:
        raise UserError(
            f"a base in {values['quantization_bit']} bits cannot be tuned in full",
            code="A107",
            remedy="Give --method lora or ptuning, or leave out the quantization",
        )
