"""The weight files of a folder by their headers, directories and sizes; no tensor is read."""

import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm_tuning.doctor.findings import Finding, ok, problem

WEIGHT_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_POINTER_HEAD = b"version https://git-lfs"
_PICKLE_HEAD = b"\x80"
_ZIP_HEAD = b"PK"
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100 << 20
_EMBEDDINGS = "transformer.word_embeddings.weight"
_AGAIN = "Delete this file and download it again"


@dataclass(frozen=True)
class _Weights:
    """What a folder says it holds. tensors: name to file where an index says so, else empty."""

    files: tuple[Path, ...]
    tensors: Mapping[str, str]
    total_bytes: int | None


def looks_like_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS puts in the place of a large one."""
    with path.open("rb") as stream:
        return stream.read(len(_POINTER_HEAD)) == _POINTER_HEAD


def check_weights(folder: Path) -> Iterator[Finding]:
    """Yield what is the matter with the weight files of `folder`, one finding for each file that is not whole."""
    name = next((name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if name is None:
        yield problem(
            "weights",
            f"there are none (none of {', '.join(WEIGHT_NAMES)})",
            code="M113",
            remedy="Download the weights with their index",
        )
        return
    weights = _Weights((folder / name,), {}, None)
    if name.endswith(".json"):
        read = _read_index(folder / name)
        if read is None:
            yield problem(name, "it is no index (JSON with a weight_map)", code="M117", remedy=_AGAIN)
            return
        weights = read
    missing = [file.name for file in weights.files if not file.is_file()]
    if missing:
        yield problem(
            "weights",
            f"{len(missing)} of {len(weights.files)} files are missing: {', '.join(missing)}",
            code="M114",
            remedy="Download them into the folder, under these names",
        )
    found = [finding for file in weights.files if file.name not in missing for finding in _file_findings(file, weights)]
    yield from found
    if weights.tensors and _EMBEDDINGS not in weights.tensors:
        yield problem(
            name,
            f"it has no {_EMBEDDINGS}: it is another model's, or an adapter's",
            code="M119",
            remedy="Take weights and config.json from one download of ChatGLM-6B",
        )
    if not missing and not found:
        yield from _size_findings(weights)


def _read_index(path: Path) -> _Weights | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tensors = {str(key): str(name) for key, name in content["weight_map"].items()}
        total = content.get("metadata", {}).get("total_size")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    files = tuple(path.parent / Path(name).name for name in sorted(set(tensors.values())))
    return _Weights(files, tensors, int(total) if isinstance(total, int | float) else None) if files else None


def _file_findings(file: Path, weights: _Weights) -> Iterator[Finding]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(len(_POINTER_HEAD))
    if head == _POINTER_HEAD:
        yield problem(
            file.name,
            "it is a Git LFS pointer, not the weights",
            code="M115",
            remedy="Run `git lfs pull` in the folder, or download this file",
        )
    elif file.suffix == ".safetensors":
        yield from _safetensors_findings(file, weights)
    elif head.startswith(_ZIP_HEAD):
        if not _is_zip(file):
            yield problem(
                file.name,
                f"it is cut off: its directory, at its end, is not there ({size:,} bytes)",
                code="M116",
                remedy=_AGAIN,
            )
    elif not head.startswith(_PICKLE_HEAD):
        kind = "a web page" if head.lstrip().lower().startswith((b"<!doctype", b"<html")) else "no weight file"
        yield problem(file.name, f"it is {kind} ({size:,} bytes)", code="M116", remedy=_AGAIN)


def _is_zip(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # it says so of some that are damaged, and whole ones they are not
        return False


def _safetensors_findings(file: Path, weights: _Weights) -> Iterator[Finding]:
    size = file.stat().st_size
    header = _read_header(file, size)
    if header is None:
        yield problem(file.name, f"its header cannot be read ({size:,} bytes)", code="M116", remedy=_AGAIN)
        return
    tensors, expected = header
    if expected != size:
        what = "it is cut off" if size < expected else "it has more bytes than its header says"
        yield problem(file.name, f"{what}: {size:,} of {expected:,} bytes", code="M116", remedy=_AGAIN)
    named = {key for key, name in weights.tensors.items() if name == file.name}
    if absent := sorted(named - set(tensors)):
        yield problem(
            file.name,
            f"the index says that it holds {absent[0]}, and it does not ({len(absent)} such tensors)",
            code="M117",
            remedy="Take index and weights from one download",
        )


def _read_header(file: Path, size: int) -> tuple[dict[str, Any], int] | None:
    """Return the tensors by name, and the bytes that the file must have; None for a header that is none."""
    with file.open("rb") as stream:
        start = stream.read(_LENGTH_BYTES)
        if len(start) < _LENGTH_BYTES:
            return None
        (length,) = struct.unpack("<Q", start)
        if length > min(size, _MOST_HEADER_BYTES):
            return None
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((int(facts["data_offsets"][1]) for facts in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return None
    return header, _LENGTH_BYTES + length + end


def _size_findings(weights: _Weights) -> Iterator[Finding]:
    size = sum(file.stat().st_size for file in weights.files)
    if weights.total_bytes is not None and size < weights.total_bytes:
        yield problem(
            "weights",
            f"the files have {size:,} bytes together, and the index says {weights.total_bytes:,} at least",
            code="M116",
            remedy="Compare each file's size with the download page, and download the smaller ones again",
        )
        return
    count = f", {len(weights.tensors)} tensors" if weights.tensors else ""
    yield ok(
        "weights", f"{len(weights.files)} file(s), {size / 2**30:.2f} GiB{count}, each whole by header or directory"
    )
