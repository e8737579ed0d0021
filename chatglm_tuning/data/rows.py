"""Rows of JSON files with their line numbers: json arrays, json lines, and the gzip of either, told apart by content.

Lines are streamed one at a time. An array is held as text (its rows are still decoded one at a time): a file of
gigabytes belongs in json lines.
"""

import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from chatglm_tuning.errors import UserError
from chatglm_tuning.wording import counted

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 20

_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass
class BadRows:
    """Every row that could not be used: all counted, the first few kept as `file:line: what is wrong`."""

    count: int = 0
    shown: list[str] = field(default_factory=list)
    is_fatal: bool = False

    def add(self, where: str, what: str) -> None:
        """Count one bad row."""
        self.count += 1
        if len(self.shown) < SHOWN_PROBLEMS:
            self.shown.append(f"{where}: {what}")

    def add_fatal(self, where: str, what: str) -> None:
        """Count a place after which a file could not be read any further: skipping rows does not mend that."""
        self.is_fatal = True
        self.add(where, what)

    def settle(self, *, skip_bad_rows: bool | None) -> None:
        """Raise UserError with the bad rows, if any; with `skip_bad_rows` only log them, unless a file broke off.

        skip_bad_rows: None where the command has no such flag, of which nothing is then said.
        """
        if not self.count:
            return
        total = f"{counted(self.count, 'bad row')} in all"
        if self.count > len(self.shown):
            total += f", the first {len(self.shown)} shown above"
        listing = "\n".join(self.shown)
        if self.is_fatal:
            remedy = "Mend the files"
            if skip_bad_rows is not None:
                remedy += "; --skip_bad_rows cannot help where the rest of a file is unreadable"
            raise UserError(f"{listing}\n{total}", remedy=remedy)
        if not skip_bad_rows:
            remedy = "Mend them" if skip_bad_rows is None else "Mend them, or pass --skip_bad_rows to leave them out"
            raise UserError(f"{listing}\n{total}", remedy=remedy)
        logger.warning("%s\nskipped: %s", listing, total)


def check_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return `paths` as Path objects; raises UserError where one is not a file that can be read."""
    files = [Path(path) for path in paths]
    for file in files:
        if file.is_dir():
            raise UserError("this is a folder, not a file", remedy="Give the data files themselves", where=str(file))
        if not file.exists():
            raise UserError("there is no such file", remedy="Check the path", where=str(file))
        if not os.access(file, os.R_OK):
            raise UserError("the file may not be read", remedy="Check its permissions", where=str(file))
    return files


def iterate_rows(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield `(line, value)` of every row of `path`; what is not JSON goes to `bad_rows`.

    line: 1-based line of the file on which the row starts. Blank lines are passed over. Bytes that are not UTF-8
    arrive as lone surrogates, for whoever reads the text to refuse.
    """
    rows_seen, line_number = False, 0
    try:
        with _open_bytes(path) as stream:
            for line_number, raw_line in enumerate(stream, start=1):
                line = raw_line.removeprefix(_UTF8_BOM) if line_number == 1 else raw_line
                if line_number == 1 and line.startswith(_UTF16_BOMS):
                    bad_rows.add_fatal(f"{path}:1", "the file is UTF-16; save it as UTF-8")
                    return
                if not line.strip():
                    continue
                if not rows_seen and line.lstrip().startswith(b"["):
                    yield from _array_rows(path, line + stream.read(), line_number, bad_rows)
                    return
                rows_seen = True
                yield from _line_row(path, line, line_number, bad_rows)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        bad_rows.add_fatal(f"{path}:{line_number + 1}", f"the gzip data is damaged or cut off here ({error})")
        return
    if not rows_seen:
        bad_rows.add_fatal(f"{path}:1", "the file is empty")


def _open_bytes(path: Path) -> BinaryIO | gzip.GzipFile:
    stream = path.open("rb")
    magic = stream.read(len(_GZIP_MAGIC))
    stream.seek(0)
    if magic != _GZIP_MAGIC:
        return stream
    stream.close()
    return gzip.open(path, "rb")


def _line_row(path: Path, line: bytes, line_number: int, bad_rows: BadRows) -> Iterator[tuple[int, Any]]:
    try:
        value = json.loads(line.rstrip().decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        hint = " (a row over several lines? put each row on one line, or all rows into [ ])"
        is_start_of_object = line.strip() == b"{"
        bad_rows.add(f"{path}:{line_number}", f"not JSON: {_reason(error)}{hint if is_start_of_object else ''}")
        return
    yield line_number, value


def _array_rows(path: Path, data: bytes, first_line: int, bad_rows: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield the rows of the array that `data` holds; its first byte lies on `first_line`."""
    text = data.decode("utf-8", "surrogateescape")
    line, counted = first_line, 0
    position = _skip_space(text, text.index("[") + 1)
    if text.startswith("]", position):
        bad_rows.add_fatal(f"{path}:{first_line}", "the array holds no rows")
        return
    while True:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            broken_line = line + text.count("\n", position, getattr(error, "pos", position))
            what = f"not JSON: {_reason(error)}; the rows after it cannot be read"
            bad_rows.add_fatal(f"{path}:{broken_line}", what)
            return
        yield line, value
        position = _skip_space(text, end)
        if not text.startswith(",", position):
            break
        position = _skip_space(text, position + 1)
    rest = _skip_space(text, position + 1)
    if text.startswith("]", position) and rest == len(text):
        return
    broken_line = line + text.count("\n", counted, position if not text.startswith("]", position) else rest)
    found = "more text after the array" if text.startswith("]", position) else "no comma or ] after this row"
    bad_rows.add_fatal(f"{path}:{broken_line}", f"not JSON: {found}; what follows cannot be read")


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
