"""Rows of JSON files with their line numbers: json arrays, json lines, and the gzip of either, told apart by content.

Rows are streamed one at a time, from lines and from arrays: no file, however long or well compressed, needs more memory
than its longest row, and no row may be longer than `MOST_ROW_BYTES`.
"""

import codecs
import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from chatglm_tuning.errors import UserError
from chatglm_tuning.wording import counted

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 20
MOST_ROW_BYTES = 16 << 20
"""A row beyond this is a bad row: the whole context of the model is some kilobytes of text."""

# Text of natural language becomes 3 to 20 times smaller, the same row again and again a thousand times.
_MOST_EXPANSION = 200
_ALWAYS_EXPANDED_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 16
# How far a decoded number may be from the end of what was read and still go on: in `1e+5` behind the `1`.
_LONGEST_OPEN_NUMBER_END = 4

_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()
_TOO_LONG = f"the row is longer than {MOST_ROW_BYTES >> 20} MiB, which is the most; make several rows of it"


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
            raise UserError(f"{listing}\n{total}", code="D104", remedy=remedy)
        if not skip_bad_rows:
            remedy = "Mend them" if skip_bad_rows is None else "Mend them, or pass --skip_bad_rows to leave them out"
            raise UserError(f"{listing}\n{total}", code="D103", remedy=remedy)
        logger.warning("%s\nskipped: %s", listing, total)


def check_files(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return `paths` as Path objects; raises UserError where one is not a file that can be read."""
    files = [Path(path) for path in paths]
    for file in files:
        if file.is_dir():
            raise UserError(
                "this is a folder, not a file", code="D101", remedy="Give the data files themselves", where=str(file)
            )
        if not file.exists():
            raise UserError("there is no such file", code="D101", remedy="Check the path", where=str(file))
        if not os.access(file, os.R_OK):
            raise UserError("the file may not be read", code="D102", remedy="Check its permissions", where=str(file))
    return files


def iterate_rows(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield `(line, value)` of every row of `path`; what is not JSON goes to `bad_rows`.

    line: 1-based line of the file on which the row starts. Blank lines are passed over. Bytes that are not UTF-8
    arrive as lone surrogates, for whoever reads the text to refuse.
    """
    rows_seen, line_number = False, 0
    try:
        with _open_bytes(path) as stream:
            while raw_line := stream.readline(MOST_ROW_BYTES + 1):
                line_number += 1
                line = raw_line.removeprefix(_UTF8_BOM) if line_number == 1 else raw_line
                if line_number == 1 and line.startswith(_UTF16_BOMS):
                    bad_rows.add_fatal(f"{path}:1", "the file is UTF-16; save it as UTF-8")
                    return
                is_cut = len(raw_line) > MOST_ROW_BYTES
                if not is_cut and not line.strip():
                    continue
                if not rows_seen and line.lstrip().startswith(b"["):
                    yield from _array_rows(path, _ArrayText(line, stream, line_number), bad_rows)
                    return
                rows_seen = True
                if is_cut:
                    _skip_rest_of_line(raw_line, stream)
                    bad_rows.add(f"{path}:{line_number}", _TOO_LONG)
                    continue
                yield from _line_row(path, line, line_number, bad_rows)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        bad_rows.add_fatal(f"{path}:{line_number + 1}", f"the gzip data is damaged or cut off here ({error})")
        return
    except _ExpandsTooMuchError as error:
        bad_rows.add_fatal(f"{path}:{line_number + 1}", str(error))
        return
    if not rows_seen:
        bad_rows.add_fatal(f"{path}:1", "the file is empty")


class _ExpandsTooMuchError(ValueError):
    """A gzip file becomes so much larger that it was made to fill a memory or a disk."""


class _Unpacked:
    """The bytes of a gzip file. Reading raises _ExpandsTooMuchError where they are too many for its size."""

    def __init__(self, path: Path) -> None:
        self._stream = gzip.open(path, "rb")  # noqa: SIM115  (closed by __exit__)
        self._room = max(_ALWAYS_EXPANDED_BYTES, _MOST_EXPANSION * path.stat().st_size)
        self._limit = self._room

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def readline(self, size: int) -> bytes:
        return self._counted(self._stream.readline(size))

    def read(self, size: int) -> bytes:
        return self._counted(self._stream.read(size))

    def _counted(self, data: bytes) -> bytes:
        self._room -= len(data)
        if self._room < 0:
            raise _ExpandsTooMuchError(
                f"the gzip data unpacks to more than {self._limit:,} bytes, over {_MOST_EXPANSION} times the file's "
                "size; unpack it yourself if it is what you think"
            )
        return data


def _open_bytes(path: Path) -> BinaryIO | _Unpacked:
    stream = path.open("rb")
    magic = stream.read(len(_GZIP_MAGIC))
    stream.seek(0)
    if magic != _GZIP_MAGIC:
        return stream
    stream.close()
    return _Unpacked(path)


def _skip_rest_of_line(start: bytes, stream: BinaryIO | _Unpacked) -> None:
    while start and not start.endswith(b"\n"):
        start = stream.readline(_CHUNK_BYTES)


def _line_row(path: Path, line: bytes, line_number: int, bad_rows: BadRows) -> Iterator[tuple[int, Any]]:
    try:
        value = json.loads(line.rstrip().decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        hint = " (a row over several lines? put each row on one line, or all rows into [ ])"
        is_start_of_object = line.strip() == b"{"
        bad_rows.add(f"{path}:{line_number}", f"not JSON: {_reason(error)}{hint if is_start_of_object else ''}")
        return
    yield line_number, value


class _ArrayText:
    """The text of an array, of which only the row that is being decoded is held.

    text, position: what is held, and how far it is decoded. first: the bytes that were read of it already; the first
    of them is on `line`.
    """

    def __init__(self, first: bytes, stream: BinaryIO | _Unpacked, line: int) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text = self._decoder.decode(first)
        self.position = 0
        self._marked, self._line, self._column = 0, line, 1  # a place in `text` whose line and column are known

    def read_more(self) -> bool:
        """Forget what is decoded, and take as much again as is left; returns False where the file has no more."""
        data = self._stream.read(max(_CHUNK_BYTES, len(self.text) - self.position))
        more = self._decoder.decode(data, final=not data)
        if not more and not data:
            return False
        self._mark()
        self.text, self.position, self._marked = self.text[self.position :] + more, 0, 0
        return True

    def skip_space(self, position: int) -> None:
        """Go on from `position` to the next character that is no space."""
        self.position = position
        while True:
            found = _SPACE.match(self.text, self.position)
            self.position = found.end() if found else self.position
            if self.position < len(self.text) or not self.read_more():
                return

    def decode_value(self) -> Any:
        """Decode the value at the position, and go behind it; raises as JSONDecoder does, or _RowTooLongError."""
        self._mark()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except json.JSONDecodeError:
                if len(self.text) - self.position > MOST_ROW_BYTES:
                    raise _RowTooLongError(_TOO_LONG) from None
                if not self.read_more():
                    raise
                continue
            if end - self.position > MOST_ROW_BYTES:
                raise _RowTooLongError(_TOO_LONG)
            if len(self.text) - end >= _LONGEST_OPEN_NUMBER_END or not self.read_more():
                self.position = end
                return value

    def place_of(self, position: int) -> tuple[int, int]:
        """Return line and column, both counted from 1, of a position that is not before the value decoded last."""
        lines = self.text.count("\n", self._marked, position)
        if not lines:
            return self._line, self._column + position - self._marked
        return self._line + lines, position - self.text.rindex("\n", self._marked, position)

    def _mark(self) -> None:
        self._line, self._column = self.place_of(self.position)
        self._marked = self.position


class _RowTooLongError(ValueError):
    """A row of an array has more than `MOST_ROW_BYTES`."""


def _array_rows(path: Path, array: _ArrayText, bad_rows: BadRows) -> Iterator[tuple[int, Any]]:
    """Yield the rows of an array."""
    array.skip_space(array.text.index("[") + 1)
    if array.text.startswith("]", array.position):
        bad_rows.add_fatal(f"{path}:{array.place_of(array.position)[0]}", "the array holds no rows")
        return
    while True:
        line, _ = array.place_of(array.position)
        try:
            value = array.decode_value()
        except _RowTooLongError as error:
            bad_rows.add_fatal(f"{path}:{line}", f"{error}; the rows after it cannot be read")
            return
        except (ValueError, RecursionError) as error:
            line, column = array.place_of(getattr(error, "pos", array.position))
            bad_rows.add_fatal(
                f"{path}:{line}", f"not JSON: {_reason(error, column)}; the rows after it cannot be read"
            )
            return
        yield line, value
        array.skip_space(array.position)
        if not array.text.startswith(",", array.position):
            break
        array.skip_space(array.position + 1)
    is_ended = array.text.startswith("]", array.position)
    if is_ended:
        array.skip_space(array.position + 1)
        if array.position == len(array.text):
            return
    found = "more text after the array" if is_ended else "no comma or ] after this row"
    line, _ = array.place_of(array.position)
    bad_rows.add_fatal(f"{path}:{line}", f"not JSON: {found}; what follows cannot be read")


def _reason(error: ValueError | RecursionError, column: int | None = None) -> str:
    """column: where it is not the one that the error says."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {column or error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
