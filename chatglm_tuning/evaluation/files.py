"""Result files of which no half is ever seen, and digests of what a result depends on."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatglm_tuning.checkpoint import fsync
from chatglm_tuning.errors import UserError

_SAMPLES = 256
_SAMPLE_BYTES = 1 << 16


def write_whole(path: Path, content: str | bytes) -> None:
    """Put a file in place in one step, once it is on the disk; after an error nothing is left of it."""
    write_all({path: content})


def write_all(contents: Mapping[Path, str | bytes]) -> None:
    """Put files of one folder in place, in their order, once all of them are on the disk; after an error none is."""
    temporaries = {path: path.with_name(f".{path.name}.part") for path in contents}
    try:
        for path, content in contents.items():
            temporaries[path].write_bytes(content.encode() if isinstance(content, str) else content)
            fsync(temporaries[path])
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in contents}:
        fsync(folder)


def json_line(content: Any) -> str:
    """Return one line of json lines, its characters as they are; what is no UTF-8 (of a path) is escaped."""
    return _encodable(json.dumps(content, ensure_ascii=False)) + "\n"


def json_text(content: Any) -> str:
    """Return the text of a JSON file that people read."""
    return _encodable(json.dumps(content, ensure_ascii=False, indent=2)) + "\n"


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_utf8(text: str) -> bool:
    """Return whether a text holds no lone surrogates, as which bytes that are no UTF-8 are read."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def digest_bytes(content: bytes) -> str:
    """Return the SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def sampled_digest(paths: list[Path]) -> str:
    """Return a SHA-256 over name, size and evenly spaced parts of each file; files up to 16 MiB are read whole.

    Weights of 13 GB are told apart in a moment: tuning changes all of them.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        step = max(_SAMPLE_BYTES, size // _SAMPLES)
        with path.open("rb") as stream:
            for position in range(0, size, step):
                stream.seek(position)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn what the system says of a disk that is full or read-only into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the results cannot be written ({error.strerror or error})",
            code="O101",
            where=str(folder),
            remedy="Give a folder with --output_dir that can be written, on a disk with room for it",
        ) from error
