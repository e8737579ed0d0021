"""Reading a JSON file of settings, with the line of everything that is wrong in it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm_tuning.errors import UserError


@dataclass(frozen=True)
class ArgumentsFile:
    """A JSON object as it stands in a file. values: what it holds, without the keys that are null."""

    path: Path
    text: str
    values: dict[str, Any]

    def label(self, key: str) -> tuple[str, str | None]:
        """Return `key` as it stands in the file, and its place as file:line."""
        return f'"{key}"', _place(self.path, self.text, key)


def read_arguments_file(path: Path) -> ArgumentsFile:
    """Read one JSON object in UTF-8 (with or without a byte order mark).

    Raises UserError with file:line when it is missing, no JSON, no object, or gives a key twice.
    """
    remedy = 'Give the path of a file with one JSON object, as {"learning_rate": 1e-3}'
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("the file is not UTF-8 text", code="A116", remedy=remedy, where=str(path)) from None
    except OSError as error:
        raise UserError(
            f"the file cannot be read ({error.strerror})", code="A116", remedy=remedy, where=str(path)
        ) from None
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        repeated.extend(key for key in keys if keys.count(key) > 1)
        return dict(pairs)

    try:
        values = json.loads(text, object_pairs_hook=collect)
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise UserError(
            f"this is not JSON: {error.msg}, column {error.colno}", code="A117", remedy=remedy, where=where
        ) from None
    except RecursionError:
        raise UserError("it is nested too deeply", code="A117", remedy=remedy, where=str(path)) from None
    if not isinstance(values, dict):
        raise UserError("the file does not hold a JSON object", code="A117", remedy=remedy, where=f"{path}:1")
    if repeated:
        where = _place(path, text, repeated[0], occurrence=1)
        raise UserError(f'"{repeated[0]}" is given twice', code="A117", remedy="Keep one of the two", where=where)
    return ArgumentsFile(path, text, {key: value for key, value in values.items() if value is not None})


def _place(path: Path, text: str, key: str, occurrence: int = 0) -> str:
    """Return file:line of a key (file alone for one written with escapes); occurrence counts from 0."""
    matches = list(re.finditer(rf'"{re.escape(key)}"\s*:', text))
    if len(matches) <= occurrence:
        return str(path)
    return f"{path}:{text.count(chr(10), 0, matches[occurrence].start()) + 1}"
