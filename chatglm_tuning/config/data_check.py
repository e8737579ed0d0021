"""The settings of `chatglm-tuning data check`, from the command line to frozen arguments."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chatglm_tuning.config.arguments import DataArguments, ModelArguments, Setting, settings_of
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.predict import check_given
from chatglm_tuning.config.sources import Registry, resolve_flags
from chatglm_tuning.config.values import Value

_DATA = {setting.name: setting for setting in settings_of(DataArguments)}
_DATA_PATH = Setting("data_path", Value("paths"), "one or more files that are to be trained on", None)
_EVAL_PATH = Setting("eval_path", Value("paths"), "one or more files that are to be evaluated on", None)
_OUTPUT_DIR = Setting("output_dir", Value("path"), "folder for report.json and lengths.png", Path("output/data-check"))
_JSON = Setting("json", Value("boolean"), "print the report as JSON", False)
_MODEL = next(setting for setting in settings_of(ModelArguments) if setting.name == "model_name_or_path")

_ELSEWHERE = {"skip_bad_rows": "Leave it out: bad rows are counted and listed, and the others looked at"}


@dataclass(frozen=True)
class DataCheckArguments:
    """Which files are looked at, and under which limits (tokens). model: folder or hub name of the tokenizer."""

    data_path: tuple[Path, ...]
    eval_path: tuple[Path, ...] = ()
    model: str = ModelArguments.model_name_or_path
    max_input_length: int = DataArguments.max_input_length
    max_output_length: int = DataArguments.max_output_length
    output_dir: Path = _OUTPUT_DIR.default
    json: bool = _JSON.default


def parse_data_check_arguments(argv: Sequence[str]) -> DataCheckArguments:
    """Return what `argv` (without the program's name) asks for; prints and raises as training does."""
    groups = [
        FlagGroup("model (only its tokenizer is read)", (_MODEL,)),
        FlagGroup("data", (_DATA_PATH, _EVAL_PATH, _DATA["max_input_length"], _DATA["max_output_length"])),
        FlagGroup("answer", (_OUTPUT_DIR, _JSON)),
    ]
    parser = build_parser("chatglm-tuning data check", "Look at data before they are trained on.", groups)
    registry = Registry.of([setting for group in groups for setting in group.settings], {})
    values = resolve_flags(read_flags(parser, argv, _ELSEWHERE), registry)
    check_given(values, _DATA_PATH)
    model = values.pop("model_name_or_path", ModelArguments.model_name_or_path)
    return DataCheckArguments(model=model, **values)
