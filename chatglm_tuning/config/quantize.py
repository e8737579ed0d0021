"""The settings of `chatglm-tuning quantize`, from the command line to frozen arguments."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatglm_tuning.config.arguments import ModelArguments, Setting, settings_of
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.sources import Registry, resolve_flags
from chatglm_tuning.config.values import Value
from chatglm_tuning.errors import UserError


@dataclass(frozen=True)
class QuantizeArguments:
    """A base model, the bits of a weight, and the new folder."""

    quantization_bit: Literal[4, 8]
    output_dir: Path
    model_name_or_path: str = ModelArguments.model_name_or_path


def parse_quantize_arguments(argv: Sequence[str]) -> QuantizeArguments:
    """Return what `argv` (without the program's name) asks for; prints and raises as training does."""
    model = [
        setting for setting in settings_of(ModelArguments) if setting.name in ("model_name_or_path", "quantization_bit")
    ]
    output = Setting("output_dir", Value("path"), "new folder for the quantised model", None)
    groups = [FlagGroup("model", tuple(model)), FlagGroup("output", (output,))]
    description = "Write a base in int8 or int4, to be loaded faster and without the full one."
    parser = build_parser("chatglm-tuning quantize", description, groups)
    values = resolve_flags(read_flags(parser, argv, {}), Registry.of([*model, output], {}))
    for name, remedy in (("quantization_bit", "Give 4 or 8"), ("output_dir", "Give the new folder")):
        if name not in values:
            raise UserError(f"--{name} is missing", code="A104", remedy=remedy)
    return QuantizeArguments(**values)
