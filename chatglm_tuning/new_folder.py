"""A folder that appears under its name when it is whole, and the weight files in it."""

import json
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from chatglm_tuning.checkpoint import file_digest, fsync
from chatglm_tuning.config.output_folder import check_output_folder
from chatglm_tuning.errors import UserError
from chatglm_tuning.folder_lock import only_writer
from chatglm_tuning.wording import told_size

TOKENIZER_FILES = ("ice_text.model", "tokenizer_config.json")
DIGESTS_NAME = "SHA256SUMS"
"""The digests of a folder's files, for `sha256sum -c` and `chatglm-tuning verify`."""
_INDEX_NAME = "model.safetensors.index.json"
_OF_A_MODEL = frozenset(("config.json", DIGESTS_NAME, _INDEX_NAME, *TOKENIZER_FILES))
_WEIGHTS = (".part", ".safetensors")
_BYTES_OF_A_FILE = 512 << 20
_OF_A_PREFIX = ("pre_seq_len", "prefix_projection")


def check_new_folder(output_dir: Path, names: Collection[str] = ()) -> None:
    """Raise UserError where `output_dir` cannot be made: it is there and not empty, or its unfinished form is not ours.

    Links are followed. What is made to see whether the folder can be written goes at once.
    names: of the files that the folder will have beside those of a model.
    """
    place = _place_of(output_dir)
    _refuse_standing(place, output_dir)
    if place == Path.cwd():
        raise UserError(
            "this is the folder that the command is run in, and a new one would take its place",
            code="O104",
            where=str(output_dir),
            remedy="Give a new folder with --output_dir",
        )
    unfinished = _unfinished(place)
    check_output_folder(unfinished if place.exists() else output_dir)
    found = [path.name for path in unfinished.iterdir()] if unfinished.is_dir() else []
    known = {*_OF_A_MODEL, *names}
    strangers = [name for name in found if name not in known and Path(name).suffix not in _WEIGHTS]
    if strangers:
        raise UserError(
            f"{unfinished.name}, which would be written to at first, holds other files ({strangers[0]})",
            code="O104",
            where=str(place.parent),
            remedy="Move it away, or give another --output_dir",
        )


def _place_of(output_dir: Path) -> Path:
    """Return where the folder will stand: its whole path, with every link followed."""
    try:
        return output_dir.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead to each other
        raise UserError(
            f"the path cannot be followed ({getattr(error, 'strerror', None) or 'its links lead in a circle'})",
            code="O101",
            where=str(output_dir),
            remedy="Give a new folder with --output_dir",
        ) from error


def _refuse_standing(place: Path, output_dir: Path) -> None:
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise UserError(
            "the output is there already",
            code="O104",
            where=str(output_dir),
            remedy="Give a new folder with --output_dir",
        )


def check_room(needed_bytes: int, output_dir: Path) -> None:
    """Raise UserError where the disk of `output_dir` has less room than that."""
    free = shutil.disk_usage(next(path for path in _place_of(output_dir).parents if path.is_dir())).free
    if needed_bytes > free:
        raise UserError(
            f"about {told_size(needed_bytes)} are needed and {told_size(free)} are free",
            code="O102",
            where=str(output_dir),
            remedy="Make room, or give a folder on another disk",
        )


@contextmanager
def appearing_whole(output_dir: Path) -> Iterator[Path]:
    """Give an empty folder to write into; on leaving it is on the disk and bears the name `output_dir`.

    After an error nothing is left of it; what a killed run has left is written anew. `check_new_folder` goes before.
    Raises UserError where it cannot be written, and where another run is writing it.
    """
    place = _place_of(output_dir)
    unfinished = _unfinished(place)
    try:
        with only_writer(output_dir, lock_path=place.parent / f".{place.name}.lock"):
            # Another run may have finished between the check and the lock.
            _refuse_standing(place, output_dir)
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            try:
                yield unfinished
                for path in sorted(unfinished.rglob("*")):
                    fsync(path)
                fsync(unfinished)
                if place.exists():
                    place.rmdir()
                unfinished.rename(place)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            fsync(place.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"the folder cannot be written ({reason})",
            code="O101",
            where=str(output_dir),
            remedy="Give a folder with --output_dir that can be written, on a disk with room for it",
        ) from error


def _unfinished(place: Path) -> Path:
    return place.parent / f".{place.name}.part"


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the tokenizer's files of the model `folder`."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of every file of `folder` into it."""
    lines = [f"{file_digest(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.is_file()]
    (folder / DIGESTS_NAME).write_text("".join(lines), encoding="utf-8", newline="\n")


def write_config(folder: Path, target: Path, changes: Mapping[str, Any]) -> None:
    """Write the config.json of the model `folder`, with `changes` and without a prefix that stood beside it."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content = {key: value for key, value in content.items() if key not in _OF_A_PREFIX} | dict(changes)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (target / "config.json").write_text(text, encoding="utf-8")


class WeightsWriter:
    """Writes tensors into safetensors files of about one size, and their index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._names: list[list[str]] = []
        self._total_bytes = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor, which must stay as it is until the file is written."""
        pending_bytes = sum(waiting.nbytes for waiting in self._pending.values())
        if self._pending and pending_bytes + tensor.nbytes > _BYTES_OF_A_FILE:
            self._write_pending()
        self._pending[key] = tensor
        self._total_bytes += tensor.nbytes

    def _write_pending(self) -> None:
        path = self._part(len(self._names))
        save_file(self._pending, path, metadata={"format": "pt"})
        self._names.append(list(self._pending))
        self._pending = {}

    def _part(self, number: int) -> Path:
        return self._folder / f"{number:05d}.part"

    def finish(self) -> int:
        """Write what is left, name the files by their number, and write the index; return the bytes of all tensors."""
        self._write_pending()
        weight_map = {}
        for number, keys in enumerate(self._names):
            name = f"model-{number + 1:05d}-of-{len(self._names):05d}.safetensors"
            self._part(number).rename(self._folder / name)
            weight_map |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        path = self._folder / _INDEX_NAME
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for name in set(weight_map.values()):
            # safetensors keeps a file from everyone but its owner; the umask decided over the index.
            (self._folder / name).chmod(stat.S_IMODE(path.stat().st_mode))
        return self._total_bytes
