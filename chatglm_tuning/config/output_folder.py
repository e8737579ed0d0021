"""Whether a folder can be written to, found out before anything slow begins."""

import errno
import os
import tempfile
from pathlib import Path

from chatglm_tuning.errors import UserError


def check_output_folder(folder: Path) -> None:
    """Raise UserError for a file, and for a folder that cannot be made or written.

    What is made to see whether it can goes at once.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError("output_dir is a file", code="O101", where=str(folder), remedy="Give a folder")
    folders = [folder.absolute(), *folder.absolute().parents]
    standing = next(path for path in folders if path.exists())
    try:
        if standing != folders[0]:
            tempfile.TemporaryDirectory(prefix=".chatglm-tuning-", dir=standing).cleanup()
        elif not os.access(standing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"output_dir cannot be written ({error.strerror})",
            code="O101",
            where=str(folder),
            remedy="Give a folder with --output_dir that can be written",
        ) from error
