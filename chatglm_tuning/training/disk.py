"""What a run does where the disk is full, or stops to take what is written."""

import errno
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from chatglm_tuning.checkpoint import whole_checkpoints
from chatglm_tuning.errors import UserError
from chatglm_tuning.wording import told_size

logger = logging.getLogger(__name__)

_OF_A_DISK = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "it has become read-only",
    errno.EACCES: "writing is not permitted",
    errno.EIO: "the disk reports an error",
}
_GONE = "it is gone"
_NOT_FOUND = re.compile(r"os error 2\b|Parent directory .* does not exist")  # of safetensors and of torch
_SYSTEM_ERROR = re.compile(r"os error (\d+)")  # how safetensors tells the operating system's error
_OF_A_TORCH_FILE = ("inline_container.cc", "iostream error")  # its writer does not tell the system's error at all
_LEAST_BYTES = 64 << 20
_BYTES_OF_A_STATE = 12  # of an AdamW checkpoint, a parameter: its value and two moments, fp32


@contextmanager
def told_disk_errors(output_dir: Path) -> Iterator[None]:
    """Turn an error of the disk that is written to into a UserError that names the checkpoint to go on from."""
    try:
        with _quiet_threads():
            yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _reason(error, output_dir)
        if reason is None:
            raise
        if reason is _GONE:
            raise UserError(
                "the folder was removed or moved while the run wrote to it",
                code="O101",
                where=str(output_dir),
                remedy="leave it in its place until the run ends; where it was moved, move it back and go on with "
                "--resume_from_checkpoint",
            ) from error
        whole = next(whole_checkpoints(output_dir), None)
        go_on = (
            "start the run again" if whole is None else f"go on with --resume_from_checkpoint {whole}, which is whole"
        )
        raise UserError(
            f"the run cannot write its files ({reason})",
            code="O102",
            where=str(output_dir),
            remedy=f"make room, then {go_on}",
        ) from error


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Say what the disk did to a thread that writes (TensorBoard's) in a line; the run meets the same error later."""
    previous = threading.excepthook

    def told(happened: threading.ExceptHookArgs) -> None:
        if isinstance(happened.exc_value, OSError):
            logger.warning("%s", happened.exc_value)
        else:
            previous(happened)

    threading.excepthook = told
    try:
        yield
    finally:
        threading.excepthook = previous


def _reason(error: Exception, folder: Path) -> str | None:
    """Return what is the matter with the disk; None for an error of another kind."""
    if not folder.is_dir() and (isinstance(error, FileNotFoundError) or _NOT_FOUND.search(str(error))):
        return _GONE
    if isinstance(error, OSError):
        return _OF_A_DISK.get(error.errno or 0)
    number = _SYSTEM_ERROR.search(str(error))
    if number is not None:
        return _OF_A_DISK.get(int(number[1]))
    if any(mark in str(error) for mark in _OF_A_TORCH_FILE):
        is_full = shutil.disk_usage(folder).free < _LEAST_BYTES
        return _OF_A_DISK[errno.ENOSPC] if is_full else "a file was cut short while it was written"
    return None


def check_room(model: nn.Module, output_dir: Path) -> None:
    """Raise UserError where a checkpoint of what is trained of `model` would not fit on the disk."""
    folder = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    needed, free = trained * _BYTES_OF_A_STATE, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"a checkpoint takes about {told_size(needed)}, and {told_size(free)} are free on the disk",
            code="O102",
            where=str(output_dir),
            remedy="make room, or give an --output_dir on another disk",
        )
