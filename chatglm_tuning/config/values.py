"""What one setting may hold, and the conversion of what a user gave (a flag's text or a JSON value) into it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from chatglm_tuning.errors import UserError

Kind = Literal["text", "integer", "number", "boolean", "path", "paths", "names", "mapping", "anything"]

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

_DESCRIPTIONS: dict[Kind, str] = {
    "text": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "path": "a path",
    "paths": "one path or several",
    "names": "one name or several",
    "mapping": "a JSON object or the path of a JSON file",
    "anything": "any JSON value",
}


@dataclass(frozen=True)
class Value:
    """The kind, the choices and the range of a setting.

    choices: when given, nothing else is allowed; for "names" it holds for every name.
    at_least, at_most: bounds that are allowed themselves; above, below: bounds that are not.
    hint: one more sentence for the error message, without its full stop.
    """

    kind: Kind
    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    hint: str | None = None

    def convert(self, raw: Any, *, name: str, where: str | None = None) -> Any:
        """Return `raw` as this kind; numbers may also come as text ("1e-3"), as flags and hand-written files have them.

        name: how the user wrote the setting; where: the file and line it stands in, None for a flag.
        Raises UserError when `raw` is of another kind, no choice, or out of range.
        """
        try:
            value = _CONVERTERS[self.kind](raw)
        except (ValueError, TypeError, OverflowError):
            raise self._error(raw, name, where) from None
        if self.choices:
            for item in value if isinstance(value, tuple) else (value,):
                if item not in self.choices:
                    raise self._error(item, name, where)
        if not self._in_range(value):
            raise self._error(raw, name, where)
        return value

    def describe(self) -> str:
        """Return what is allowed, in words that follow "must be"."""
        if self.choices:
            *others, last = (str(choice) for choice in self.choices)
            return f"{', '.join(others)} or {last}" if others else last
        bounds = [
            f"{word} {bound}"
            for word, bound in (
                ("of at least", self.at_least),
                ("above", self.above),
                ("of at most", self.at_most),
                ("below", self.below),
            )
            if bound is not None
        ]
        return " ".join([_DESCRIPTIONS[self.kind], " and ".join(bounds)]).strip()

    def _in_range(self, value: Any) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _error(self, raw: Any, name: str, where: str | None) -> UserError:
        shown = repr(raw) if isinstance(raw, str) else str(raw)
        remedy = self.hint or f"Correct {name}, or leave it out to use the default"
        if self.choices and isinstance(raw, str) and (near := nearest(raw, [str(choice) for choice in self.choices])):
            remedy = f"If {near} was meant, write that"
        return UserError(f"{name} must be {self.describe()}, not {shown}", code="A103", remedy=remedy, where=where)


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Return the entry of `known` that `name` most likely misspells, or None when none is near."""
    matches = get_close_matches(name.lower().replace("-", "_"), known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _number(raw: Any) -> int | float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise TypeError
    if isinstance(raw, int):
        return raw
    value = float(raw)
    if not math.isfinite(value):
        raise ValueError
    # A whole number stays an int: Trainer compares some of these settings with step counts.
    return int(raw) if isinstance(raw, str) and raw.strip().lstrip("+-").isdecimal() else value


def _integer(raw: Any) -> int:
    value = _number(raw)
    if value != int(value):
        raise ValueError
    return int(value)


def _boolean(raw: Any) -> bool:
    if not isinstance(raw, bool | int | str):
        raise TypeError
    word = str(raw).strip().lower()
    if word not in _BOOLEANS:
        raise ValueError
    return _BOOLEANS[word]


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError
    if not raw.strip():
        raise ValueError
    return raw


def expand_home(path: str) -> Path:
    """Return `path` with `~` and `~name` replaced; raises UserError where nobody has that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        who = Path(path).parts[0]
        raise UserError(
            f"{path}: {who} is nobody's folder on this machine",
            code="A115",
            remedy=f"Write the whole path; for a folder that is named so, ./{path}",
        ) from error


def _path(raw: Any) -> Path:
    return expand_home(_text(raw))


def _paths(raw: Any) -> tuple[Path, ...]:
    return tuple(_path(item) for item in _several(raw))


def _names(raw: Any) -> tuple[str, ...]:
    return tuple(_text(part.strip()) for item in _several(raw) for part in _text(item).split(","))


def _several(raw: Any) -> Sequence[Any]:
    items = raw if isinstance(raw, list | tuple) else [raw]
    if not items:
        raise ValueError
    return items


def _mapping(raw: Any) -> dict[str, Any] | str:
    return raw if isinstance(raw, dict) else _text(raw)


def _anything(raw: Any) -> Any:
    return raw


_CONVERTERS = {
    "text": _text,
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "path": _path,
    "paths": _paths,
    "names": _names,
    "mapping": _mapping,
    "anything": _anything,
}
