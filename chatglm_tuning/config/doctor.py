"""The settings of `chatglm-tuning doctor`, from the command line to frozen arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatglm_tuning.config.arguments import Setting
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.sources import Registry, resolve_flags
from chatglm_tuning.config.values import Value
from chatglm_tuning.errors import UserError

Language = Literal["en", "zh"]

_MODEL = Setting("model_name_or_path", Value("text"), "folder of a base model that is to be checked", None)
_OUTPUT_DIR = Setting("output_dir", Value("path"), "folder that results are to be written to", Path("output"))
_TRACEBACK = Setting("traceback", Value("text"), "file with an error as it was printed, - for what is pasted", None)
_LANGUAGE = Setting(
    "language",
    Value("text", choices=("en", "zh")),
    "of pages and of explained tracebacks; without it, the locale's",
    None,
)
# The first of these that is set decides, as for other programs.
_LOCALE_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")


@dataclass(frozen=True)
class DoctorArguments:
    """What is asked: with a code its page, with a traceback its explanation, else a look at the machine.

    traceback: path of a file, "-" = standard input.
    """

    language: Language
    code: str | None = None
    traceback: str | None = None
    model: str | None = None
    output_dir: Path = _OUTPUT_DIR.default


def parse_doctor_arguments(argv: Sequence[str], environment: Mapping[str, str]) -> DoctorArguments:
    """Return what `argv` (without the program's name) asks for; prints and raises as training does."""
    groups = [
        FlagGroup("explain (or give a code: chatglm-tuning doctor D103)", (_TRACEBACK, _LANGUAGE)),
        FlagGroup("look at", (_MODEL, _OUTPUT_DIR)),
    ]
    words = list(argv)
    code = _take_code(words)
    description = "Look at environment, devices, disk, memory and a model folder; explain an error code or a traceback."
    parser = build_parser("chatglm-tuning doctor", description, groups)
    registry = Registry.of([setting for group in groups for setting in group.settings], {})
    values = resolve_flags(read_flags(parser, words, {}), registry)
    _check(code, values)
    values.setdefault("language", language_of(environment))
    return DoctorArguments(code=code, model=values.pop("model_name_or_path", None), **values)


def _take_code(words: list[str]) -> str | None:
    """Take the code out of the words of a command line, wherever it stands among the flags; None where there is none.

    Raises UserError for two of them.
    """
    before = ["", *words]
    places = [
        place
        for place, word in enumerate(words)
        if not word.startswith("-") and (not before[place].startswith("--") or "=" in before[place])
    ]
    if len(places) > 1:
        given = " and ".join(words[place] for place in places)
        raise UserError(f"more than one code is given ({given})", code="A105", remedy="Ask for one at a time")
    return words.pop(places[0]) if places else None


def language_of(environment: Mapping[str, str]) -> Language:
    """Return the language that the locale's variables ask for: Chinese or else English."""
    chosen = next((environment[name] for name in _LOCALE_VARIABLES if environment.get(name)), "")
    return "zh" if chosen.lower().startswith("zh") else "en"


def _check(code: str | None, values: Mapping[str, Any]) -> None:
    """Raise UserError where more than one thing is asked."""
    asked = "a code" if code is not None else f"--{_TRACEBACK.name}" if _TRACEBACK.name in values else None
    if code is not None and _TRACEBACK.name in values:
        raise UserError(f"{code} and --{_TRACEBACK.name} are both given", code="A105", remedy="Ask for one at a time")
    for name in (_MODEL.name, _OUTPUT_DIR.name):
        if asked and name in values:
            raise UserError(f"--{name} changes nothing beside {asked}", code="A106", remedy="Leave it out")
