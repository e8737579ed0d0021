"""Weight files of a model folder: found, checked and read one tensor at a time.

Everything is memory-mapped where its format allows, and nothing but plain tensors is ever unpickled.
"""

import ctypes
import mmap
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from chatglm_tuning.errors import UserError
from chatglm_tuning.small_json import read_small_json

# An index goes before a single file: a prefix of the original may lie as pytorch_model.bin beside the model's shards.
WEIGHT_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_BLOCK_BYTES = 4 << 20
_READ_AHEAD_BYTES = 256 << 20
_REQUEST_BYTES = 1 << 17  # Linux reads no more at one request than it would read ahead by itself
_LFS_HEAD = b"version https://git-lfs"
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
# Tied embeddings are two tensors in the bytes of one.
_MOST_SHARED = 2
_DOWNLOAD_AGAIN = "Copy or download this file again"


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of one folder, in the order in which they are read."""

    folder: Path
    files: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.stat().st_size for file in self.files)


def find_weight_files(folder: Path) -> WeightFiles:
    """Find the weights of `folder`: safetensors before `.bin`, and of each an index before a single file.

    Raises UserError where there are none, where a shard of the index is missing or lies outside the folder, and
    where a file cannot be a whole one or, being a zip archive, holds more than plain tensors.
    """
    for name in WEIGHT_NAMES:
        path = folder / name
        if path.is_file():
            files = _files_of_index(path) if name.endswith(".json") else (path,)
            for file in files:
                _check_whole(file)
            return WeightFiles(folder, files)
    raise UserError(
        f"the folder has no weights (none of {', '.join(WEIGHT_NAMES)})",
        code="M113",
        where=str(folder),
        remedy="Give the folder of a downloaded ChatGLM-6B",
    )


def _files_of_index(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(read_small_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "this is not an index of weight files (JSON with a weight_map)",
            code="M117",
            where=str(index),
            remedy=_DOWNLOAD_AGAIN,
        ) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(
                f"the index names a file outside its folder: {name!r}",
                code="M117",
                where=str(index),
                remedy=_DOWNLOAD_AGAIN,
            )
    missing = [name for name in names if not os.path.isfile(index.parent / name)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing)}",
            code="M114",
            where=str(index.parent),
            remedy="Copy or download them into the folder",
        )
    return tuple(index.parent / name for name in names)


def _check_whole(file: Path) -> None:
    with file.open("rb") as stream:
        head = stream.read(len(_LFS_HEAD))
    if head == _LFS_HEAD:
        raise UserError(
            "this is a Git LFS pointer, not the weights themselves",
            code="M115",
            where=str(file),
            remedy="Run `git lfs pull` in the folder, or download this file",
        )
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return
        except (SafetensorError, OSError) as error:
            raise _damaged(file) from error
    # A zip archive is memory-mapped: reading what it holds costs nothing. The older format would be read whole.
    if head.startswith(b"PK"):
        load_bin(file)


def _damaged(file: Path) -> UserError:
    size = file.stat().st_size
    return UserError(
        f"the weight file is truncated or damaged ({size:,} bytes)",
        code="M116",
        where=str(file),
        remedy=_DOWNLOAD_AGAIN,
    )


class StoredTensor(NamedTuple):
    """A tensor of a weight file, on the CPU. It is (key, tensor), and may be kept; nobody writes to it."""

    key: str
    tensor: Tensor

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield consecutive rows with their place, a small part of the tensor `(rows, …)` at a time."""
        rows_at_once = max(1, _BLOCK_BYTES * len(self.tensor) // max(1, self.tensor.nbytes))
        for start in range(0, len(self.tensor), rows_at_once):
            place = slice(start, start + rows_at_once)
            yield place, self.tensor[place]


class MappedTensor(StoredTensor):
    """A tensor that is read from its memory-mapped file where it is used."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield consecutive rows with their place; what was read of them does not stay in memory."""
        for place, block in super().blocks():
            yield place, block
            _release_pages(block)

    def release(self) -> None:
        """Let the operating system drop what was read of the tensor; it is read anew where it is used again."""
        _release_pages(self.tensor)


def iterate_tensors(files: WeightFiles, *, read_ahead: bool = True) -> Iterator[StoredTensor]:
    """Yield the tensors of all files; what was read of one leaves the memory when the next is asked for.

    read_ahead: whether the files are asked for ahead of that, all of them, so that the disk reads while the tensors are
        worked on; without it only those are read whose values are used (a `.bin` of the format before zip archives is
        read whole either way).
    Raises UserError for a damaged file and for a pickle that holds anything but plain tensors.
    """
    requests = _request_pages(files.files if read_ahead else ())
    requested_bytes = taken_bytes = 0
    for file in files.files:
        is_safetensors = file.suffix == ".safetensors"
        kind = MappedTensor if is_safetensors or is_zip(file) else StoredTensor
        for key, tensor in _iterate_safetensors(file) if is_safetensors else load_bin(file).items():
            taken_bytes += tensor.nbytes
            while requested_bytes < taken_bytes + _READ_AHEAD_BYTES:
                requested_bytes += next(requests, _READ_AHEAD_BYTES)
            stored = kind(key, tensor)
            yield stored
            if isinstance(stored, MappedTensor):
                stored.release()


def iterate_directories(files: WeightFiles) -> Iterator[tuple[Path, StoredTensor]]:
    """Yield each tensor with the file that it is in, for its name, shape and type: values are read where they are used.

    A `.bin` of the format before zip archives, which would be read whole, is left out.
    Raises UserError as `iterate_tensors` does.
    """
    for file in files.files:
        if file.suffix == ".safetensors":
            yield from ((file, StoredTensor(*pair)) for pair in _iterate_safetensors(file))
        elif is_zip(file):
            yield from ((file, StoredTensor(*pair)) for pair in load_bin(file).items())


def _request_pages(files: Iterable[Path]) -> Iterator[int]:
    """Ask the operating system for the files' next bytes, each time that a number of them is taken from here.

    It reads them on its own. Nothing is yielded where it cannot be asked.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        with file.open("rb", buffering=0) as stream:
            for offset in range(0, file.stat().st_size, _REQUEST_BYTES):
                os.posix_fadvise(stream.fileno(), offset, _REQUEST_BYTES, os.POSIX_FADV_WILLNEED)
                yield _REQUEST_BYTES


def _release_pages(tensor: Tensor) -> None:
    # Pages of a mapped file count as resident memory of the process until then. Of a tensor that is not of a mapped
    # file this would make zeros. Only whole pages: one at the tensor's ends may belong to others, too.
    if not sys.platform.startswith("linux") or tensor.nbytes < mmap.PAGESIZE:
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _iterate_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (it is no mapping)
                yield key, tensors.get_tensor(key)
    except SafetensorError as error:
        raise _damaged(file) from error


@contextmanager
def reading_progress(title: str, files: WeightFiles, *, show: bool) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many bytes more were read; `show` draws them as a bar, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not (show and console.is_terminal), transient=True) as progress:
        task = progress.add_task(title, total=files.size_bytes)
        yield lambda size: progress.advance(task, size)


def load_bin(file: Path) -> dict[str, Tensor]:
    """Read a `.bin` of plain tensors, memory-mapped where it is of the zip format.

    Raises UserError where it is damaged, would need more memory than it is large, or holds anything but a flat
    mapping of names to tensors.
    """
    state = load_plain(file)
    if not isinstance(state, dict):
        raise _no_state_dict(file, f"it holds a {type(state).__name__}")
    room = _MOST_SHARED * file.stat().st_size
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise _no_state_dict(file, f"under {key!r} it holds a {type(value).__name__}")
        if not isinstance(key, str):
            raise _no_state_dict(file, f"one of its names is a {type(key).__name__}")
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise _no_state_dict(file, f"{key!r} is no plain tensor")
        # A few bytes can say that they are a tensor of any shape, whose strides are 0.
        room -= value.nbytes
        if room < 0:
            raise _no_state_dict(file, f"with {key!r}, its tensors are larger than the file")
    return state


def load_plain(file: Path) -> Any:
    """Unpickle what torch saved, memory-mapped where it is of the zip format: plain values and tensors, never code.

    Raises UserError where it is damaged, would need more memory than it is large, or holds anything else.
    """
    if is_zip(file):
        _check_archive(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip(file))
    except pickle.UnpicklingError as error:
        refused = _REFUSED_GLOBAL.search(str(error))
        if refused is None:
            raise _damaged(file) from error
        raise UserError(
            f"the file holds more than plain tensors ({refused[1]}) and was not loaded, since it could run code",
            code="M118",
            where=str(file),
            remedy="Use weights saved as a state dict of tensors, best as safetensors",
        ) from error
    except Exception as error:  # an unpickler raises whatever damaged bytes lead it to
        raise _damaged(file) from error


def is_zip(file: Path) -> bool:
    """Return whether `file` is a zip archive, whole or not."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # it says so of some that are damaged
        return True


def _check_archive(file: Path) -> None:
    """Raise UserError for a zip archive that torch did not write: it packs nothing, so that it can be mapped."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _damaged(file) from error
    is_packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if is_packed or sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise UserError(
            "the archive is compressed, or says that it holds more than its own size, as no saved weights do",
            code="M116",
            where=str(file),
            remedy=_DOWNLOAD_AGAIN,
        )


def _no_state_dict(file: Path, found: str) -> UserError:
    return UserError(
        f"the file is no flat mapping of names to tensors ({found})",
        code="M118",
        where=str(file),
        remedy="Use weights saved as a state dict of tensors, best as safetensors",
    )


def resolve_model_folder(model_name_or_path: str) -> Path:
    """Return the folder of a model: the given one, or a snapshot of the Hugging Face repository of that name.

    Raises UserError where there is neither.
    """
    folder = Path(model_name_or_path).expanduser()
    if folder.is_dir():
        return folder
    looks_local = os.sep in model_name_or_path.rstrip("/") and model_name_or_path.count("/") != 1
    if folder.exists() or looks_local or model_name_or_path.startswith((".", "~", "/")):
        raise UserError(
            "this is a file, not a folder" if folder.exists() else "there is no such folder",
            code="M101",
            where=model_name_or_path,
            remedy="Give the folder of ChatGLM-6B with --model_name_or_path",
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.bin", "*.safetensors"]
    try:
        return Path(snapshot_download(model_name_or_path, allow_patterns=patterns))
    except Exception as error:  # the hub raises a dozen unrelated kinds, all meaning: not to be had
        raise UserError(
            f"there is no such folder, and it could not be fetched from Hugging Face ({type(error).__name__})",
            code="M102",
            where=model_name_or_path,
            remedy="Give the folder of a downloaded ChatGLM-6B with --model_name_or_path",
        ) from error
