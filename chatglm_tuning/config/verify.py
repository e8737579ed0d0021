"""The settings of `chatglm-tuning verify`, from the command line to frozen arguments."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatglm_tuning.config.arguments import ModelArguments, Setting, settings_of
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.sources import Registry, resolve_flags
from chatglm_tuning.config.values import Value
from chatglm_tuning.errors import UserError

_FOLDER = Setting("folder", Value("path"), "the same as the folder in front", None)


@dataclass(frozen=True)
class VerifyArguments:
    """A folder and, where it holds an adapter, the base to verify it on.

    model_name_or_path, quantization_bit, dtype: None = as the adapter's manifest says, else the default of training.
    """

    folder: Path
    model_name_or_path: str | None = None
    quantization_bit: Literal[4, 8] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None


def parse_verify_arguments(argv: Sequence[str]) -> VerifyArguments:
    """Return what `argv` (without the program's name) asks for; prints and raises as training does."""
    model = tuple(settings_of(ModelArguments))
    groups = [
        FlagGroup("what (or give it in front: chatglm-tuning verify FOLDER)", (_FOLDER,)),
        FlagGroup("base of an adapter (without these, that of its manifest)", model),
    ]
    words = list(argv)
    folder = words.pop(0) if words and not words[0].startswith("-") else None
    description = "See whether an adapter, a checkpoint or a model is whole and answers as it did when it was saved."
    parser = build_parser("chatglm-tuning verify", description, groups)
    values = resolve_flags(read_flags(parser, words, {}), Registry.of([_FOLDER, *model], {}))
    if (folder is None) == ("folder" not in values):
        what = "no folder is given" if folder is None else "two folders are given"
        raise UserError(what, code="A104", remedy="Write: chatglm-tuning verify FOLDER")
    return VerifyArguments(folder=Path(folder).expanduser() if folder else values.pop("folder"), **values)
