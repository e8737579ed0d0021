"""One writer a folder: the kernel holds the lock, and lets it go with the process, however that ends."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from chatglm_tuning.errors import UserError

LOCK_NAME = ".writing.lock"


@contextmanager
def only_writer(folder: Path, *, lock_path: Path | None = None) -> Iterator[None]:
    """Hold `folder`, which is made where there is none, for writing; a process that holds it may take it again.

    lock_path: the file that is locked, for a folder that is to appear whole; by default one in the folder. It goes with
    the lock, and so does a folder that was made for it and is still empty; a file that a kill has left locks nothing.
    Raises UserError where another process, or another thread, holds it.
    """
    path = lock_path or folder / LOCK_NAME
    is_made_here = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            "another run is writing here",
            code="O106",
            where=str(folder),
            remedy="Wait for its end, or give another --output_dir",
        ) from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            # While it is held: who locks a file that has lost its name takes the new one.
            with suppress(OSError):  # Windows keeps a file that is open
                path.unlink()
        lock.release()
        if is_made_here:
            with suppress(OSError):  # it holds something by now
                path.parent.rmdir()
