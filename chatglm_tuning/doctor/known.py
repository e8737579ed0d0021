"""The errors that are known by what they say, with cause and fix: read from the tables beside this module."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from chatglm_tuning.config.doctor import Language

# In this order, and in each file's own, the more particular first.
_TABLES = ("known_original.toml", "known_machine.toml")


@dataclass(frozen=True)
class KnownError:
    """An error by what it says, with its name, its cause and its fix in both languages.

    pattern: found in the text with all its whitespace as single spaces. code: of the page that says more, if any.
    follows: whether it mostly follows from another error, which may stand beside it.
    """

    pattern: re.Pattern[str]
    code: str | None
    follows: bool
    name: Mapping[Language, str]
    cause: Mapping[Language, str]
    fix: Mapping[Language, str]


@cache
def known_errors() -> tuple[KnownError, ...]:
    """Return all known errors; of several that fit a text, the first tells most."""
    return tuple(error for name in _TABLES for error in _read(Path(__file__).with_name(name)))


def _read(path: Path) -> Iterator[KnownError]:
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    languages: tuple[Language, Language] = ("en", "zh")
    shared = {language: {name: texts[language] for name, texts in content["shared"].items()} for language in languages}
    for row in content["error"]:
        texts: dict[str, Mapping[Language, str]] = {
            kind: {language: row[language][kind].format_map(shared[language]) for language in languages}
            for kind in ("name", "cause", "fix")
        }
        pattern = "|".join(f"(?:{pattern})" for pattern in row["patterns"])
        follows = row.get("follows", False)
        yield KnownError(re.compile(pattern, re.IGNORECASE), row.get("code"), follows, **texts)
