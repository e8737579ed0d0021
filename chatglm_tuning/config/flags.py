"""Command-line flags built from settings, and the reading of what was typed; every mistake is a UserError."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from chatglm_tuning.config.arguments import Setting
from chatglm_tuning.config.sources import EIGHT_BIT_KEYS
from chatglm_tuning.config.values import Value, nearest
from chatglm_tuning.errors import UserError

_METAVARS = {"integer": "N", "number": "X", "path": "PATH", "paths": "PATH", "names": "NAME", "mapping": "JSON"}
# More choices than this would fill the screen; the help text names the common ones.
_LISTED_CHOICES = 5


@dataclass(frozen=True)
class FlagGroup:
    """A heading of `--help` and the settings under it."""

    title: str
    settings: tuple[Setting, ...]


def build_parser(program: str, description: str, groups: Iterable[FlagGroup]) -> argparse.ArgumentParser:
    """Return a parser that has the flags of `groups`, keeps values as text and leaves out what was not typed."""
    parser = _Parser(
        prog=program,
        description=description,
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
        usage=f"{program} [flags]",
    )
    for group in groups:
        section = parser.add_argument_group(group.title)
        for setting in group.settings:
            _add_flag(section, setting)
            if setting.name == "quantization_bit":
                for name in EIGHT_BIT_KEYS:
                    same = "the same as --quantization_bit 8"
                    section.add_argument(f"--{name}", action="store_const", const=True, help=same)
    return parser


def read_flags(parser: argparse.ArgumentParser, argv: Sequence[str], elsewhere: dict[str, str]) -> dict[str, Any]:
    """Return what was typed, by setting; values are text, lists of text, or the boolean that a bare flag stands for.

    elsewhere: flags that this command does not have, and what to do instead.
    Raises UserError for an unknown flag, a flag without its value and a value without its flag.
    """
    try:
        typed, extra = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").split("/")[0]
        raise UserError(f"{name}: {error.message}", code="A102", remedy=f"See {parser.prog} --help") from None
    if extra:
        raise _unknown(parser, extra, elsewhere)
    return vars(typed)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message, code="A102", remedy=f"See {self.prog} --help")


def _add_flag(section: argparse._ArgumentGroup, setting: Setting) -> None:
    flag, kind = f"--{setting.name}", setting.value.kind
    help_text = setting.help + _shown_default(setting)
    if setting.off_flag is not None:
        spellings = (f"--{setting.off_flag}", f"--{setting.off_flag.replace('no_', 'no-', 1)}")
        section.add_argument(*spellings, dest=setting.name, action="store_const", const=False, help=setting.help)
        help_text = argparse.SUPPRESS
    if kind == "boolean":
        section.add_argument(flag, nargs="?", const=True, metavar="true|false", help=help_text)
    elif kind in ("paths", "names"):
        section.add_argument(flag, nargs="+", action="extend", metavar=_METAVARS[kind], help=help_text)
    else:
        section.add_argument(flag, metavar=_metavar(setting.value), help=help_text)


def _metavar(value: Value) -> str:
    if value.choices and len(value.choices) <= _LISTED_CHOICES:
        return "{" + ",".join(str(choice) for choice in value.choices) + "}"
    return _METAVARS.get(value.kind, "TEXT")


def _shown_default(setting: Setting) -> str:
    if setting.default is None or setting.default is False or setting.default == ():
        return ""
    shown = setting.default if not isinstance(setting.default, tuple) else " ".join(map(str, setting.default))
    return f" (default: {shown})"


def _unknown(parser: argparse.ArgumentParser, extra: Sequence[str], elsewhere: dict[str, str]) -> UserError:
    flags = [word.split("=")[0] for word in extra if word.startswith("--") and word != "--"]
    flags = flags or [word for word in extra if word.startswith("-") and word != "--"]
    if not flags:
        return UserError(
            f"{extra[0]!r} follows a flag that takes no value more", code="A102", remedy=f"See {parser.prog} --help"
        )
    flag = flags[0]
    name = flag.lstrip("-").replace("-", "_")
    if name in elsewhere:
        return UserError(f"{flag} is no flag of {parser.prog}", code="A101", remedy=elsewhere[name])
    known = {word.lstrip("-").replace("-", "_"): word for word in parser._option_string_actions}
    near = nearest(name, list(known))
    remedy = f"If {known[near]} was meant, write that" if near else f"See {parser.prog} --help"
    return UserError(f"{flag} is no flag of {parser.prog}", code="A101", remedy=remedy)
