"""Libraries that are missing or cannot be imported, and what to do about it."""

import sys
from collections.abc import Iterator
from importlib import import_module
from traceback import walk_tb
from types import ModuleType

from chatglm_tuning.errors import UserError

_OURS = __name__.partition(".")[0]
_NO_LIBRARIES = {_OURS, "__main__", *sys.stdlib_module_names}


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, which the optional dependencies `extra` install; raises UserError where it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UserError(
            f"{module} is not installed",
            code="X101",
            remedy=f'Install what this command needs: pip install "chatglm-tuning[{extra}]"',
        ) from error


def import_refusal(error: ImportError | OSError) -> UserError | None:
    """Return what to tell of an import of another's library that failed with `error`, None where it is anything else.

    An OSError is one where a library's own module raised it while it was imported, as for a shared library that is
    missing.
    """
    for cause in _causes(error):
        library = _broken_library(cause)
        if library is None:
            continue
        if isinstance(cause, ModuleNotFoundError) and cause.name == library:
            return UserError(
                f"{library} is not installed",
                code="X101",
                remedy="Run `chatglm-tuning doctor`, which looks at all libraries and says how to install them",
            )
        said = next(iter(str(cause).splitlines()), "")
        return UserError(
            f"{library} cannot be imported ({type(cause).__name__}: {said})",
            code="X102",
            remedy="Run `chatglm-tuning doctor`, which tries every library and says what to do",
        )
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and, of an import that failed, the errors that it came of; none of an import of our own."""
    found: BaseException | None = error
    while isinstance(found, ImportError) and str(found.name).partition(".")[0] != _OURS:
        yield found
        found = found.__cause__ or found.__context__
    if isinstance(found, OSError):
        yield found


def _broken_library(error: BaseException) -> str | None:
    """Return the library in which an import failed: the last one whose module was being run, else the one asked for."""
    running = [
        frame.f_globals.get("__name__", "")
        for frame, _line in walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    asked = getattr(error, "name", None) if isinstance(error, ImportError) else None
    libraries = [str(name).partition(".")[0] for name in (asked, *reversed(running)) if name]
    return next((name for name in libraries if name not in _NO_LIBRARIES), None)
