"""`chatglm-tuning convert-to-instruct`: ADGEN's content/summary rows to instruction/output rows, one object a line.

Reads json lines, a json array, or the gzip of either, told apart by content; writes json lines (gzip when the output
name ends in .gz). A row that cannot be used is reported as `file:line: what is wrong`, with exit code 2, and nothing
is written. Needs nothing but Python, so that `data/AdvertiseGen/convert_to_instruct.py` can run it by its path.
"""

import argparse
import errno
import gzip
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

GZIP_MAGIC = b"\x1f\x8b"
FIELDS = {"content": "instruction", "summary": "output"}


class BadInput(Exception):
    """What is wrong with the input, where, and what to do about it."""

    def __init__(self, where: str, what: str, remedy: str) -> None:
        super().__init__(f"{where}: {what}. {remedy}.")


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield `(line, value)` of every row of `path`; raises BadInput where the file cannot be read."""
    line_number = 0
    try:
        with path.open("rb") as stream:
            is_gzip = stream.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        with gzip.open(path, "rb") if is_gzip else path.open("rb") as stream:
            for line_number, raw_line in enumerate(stream, start=1):
                line = decode(path, line_number, raw_line)
                if not line.strip():
                    continue
                if line.lstrip().startswith("["):
                    text = line + decode(path, line_number + 1, stream.read())
                    yield from array_rows(path, text, line_number)
                    return
                yield line_number, decode_line(path, line_number, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadInput(
            f"{path}:{line_number + 1}", f"the gzip data is damaged ({error})", "Copy the file anew"
        ) from error
    except OSError as error:
        raise BadInput(str(path), f"the file cannot be read ({error.strerror})", "Check --input_file") from error


def decode(path: Path, first_line: int, data: bytes) -> str:
    """Return the text of `data`, which starts on `first_line` of the file."""
    try:
        return data.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise BadInput(f"{path}:{line}", "the text is not UTF-8", "Save the file as UTF-8") from error


def decode_line(path: Path, line_number: int, line: str) -> Any:
    """Return the JSON value on one line."""
    try:
        return json.loads(line.rstrip())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}:{line_number}", f"not JSON ({error})", "Mend or remove the line") from error


def array_rows(path: Path, text: str, first_line: int) -> Iterator[tuple[int, Any]]:
    """Yield the rows of the JSON array `text`, whose first character lies on `first_line`."""
    decoder = json.JSONDecoder()
    position = skip_space(text, text.index("[") + 1)
    separator = "]" if text.startswith("]", position) else ","
    while separator == ",":
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line = first_line + text.count("\n", 0, getattr(error, "pos", position))
            raise BadInput(f"{path}:{line}", f"not JSON ({error})", "Mend the array") from error
        yield first_line + text.count("\n", 0, position), value
        position = skip_space(text, end)
        separator = text[position : position + 1]
        position = skip_space(text, position + 1) if separator == "," else position
    if separator != "]" or skip_space(text, position + 1) != len(text):
        line = first_line + text.count("\n", 0, position)
        raise BadInput(f"{path}:{line}", "not JSON (the array does not end here as it should)", "Mend the array")


def skip_space(text: str, position: int) -> int:
    """Return the first position from `position` on that is not JSON white space."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def convert_row(where: str, row: Any) -> dict[str, str]:
    """Return the instruction row for one content/summary row; raises BadInput where a field cannot be used."""
    if not isinstance(row, dict):
        raise BadInput(where, "the row is not an object", "Give objects with content and summary")
    for field in FIELDS:
        if field not in row:
            raise BadInput(where, f'"{field}" is missing', f"Give every row a {field}")
        if not isinstance(row[field], str):
            raise BadInput(where, f'"{field}" is not a string', "Put the text in quotes")
        if not row[field].strip():
            raise BadInput(where, f'"{field}" is empty', "Fill it or remove the row")
        try:
            row[field].encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadInput(where, f'"{field}" holds half a surrogate pair', "Mend the \\u escape") from error
    return {new: row[old] for old, new in FIELDS.items()}


def convert(input_file: Path, output_file: Path) -> int:
    """Convert `input_file` to `output_file`, which is replaced only when all went well; return the number of rows."""
    rows = 0
    if not input_file.exists():  # told before the output, which may be wrong for the same reason
        reason = os.strerror(errno.ENOENT)
        raise BadInput(str(input_file), f"the file cannot be read ({reason})", "Check --input_file")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{output_file.name}.", dir=output_file.parent)
    except OSError as error:
        raise BadInput(str(output_file), f"cannot be written ({error.strerror})", "Check --output_file") from error
    try:
        with os.fdopen(handle, "wb") as raw:
            stream = gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) if output_file.suffix == ".gz" else raw
            for line, row in read_rows(input_file):
                converted = json.dumps(convert_row(f"{input_file}:{line}", row), ensure_ascii=False)
                stream.write(converted.encode("utf-8") + b"\n")
                rows += 1
            if stream is not raw:
                stream.close()
        if not rows:
            raise BadInput(str(input_file), "there are no rows", "Check --input_file")
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, output_file)
    except BaseException:
        os.unlink(name)
        raise
    return rows


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (sys.argv's by default); return its exit code."""
    parser = argparse.ArgumentParser(
        prog=None if argv is None else "chatglm-tuning convert-to-instruct",
        description="Convert content/summary rows to instruction/output json lines.",
    )
    parser.add_argument("--input_file", type=Path, required=True, help="json, jsonl, or the gzip of either")
    parser.add_argument("--output_file", type=Path, required=True, help="jsonl to write; gzipped if it ends in .gz")
    arguments = parser.parse_args(argv)
    try:
        rows = convert(arguments.input_file, arguments.output_file)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{rows} rows written to {arguments.output_file}")
    return 0


if __name__ == "__main__":
    sys.exit(run())
