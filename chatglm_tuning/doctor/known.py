"""How a known error is described."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from chatglm_tuning.config.doctor import Language


@dataclass(frozen=True)
class KnownError:
    """An error by what it says, with its cause and its fix in both languages.

    pattern: found in the text with all its whitespace as single spaces. code: of the page that says more, if any.
    """

    name: str
    pattern: re.Pattern[str]
    code: str | None
    cause: Mapping[Language, str]
    fix: Mapping[Language, str]


def known(name: str, pattern: str, code: str | None, *, cause: tuple[str, str], fix: tuple[str, str]) -> KnownError:
    """Return a known error; cause, fix: (English, Chinese)."""
    return KnownError(
        name,
        re.compile(pattern, re.IGNORECASE),
        code,
        {"en": cause[0], "zh": cause[1]},
        {"en": fix[0], "zh": fix[1]},
    )
