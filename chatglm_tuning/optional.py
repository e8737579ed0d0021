"""Libraries that only some commands need, and what to do where they are missing."""

from importlib import import_module
from types import ModuleType

from chatglm_tuning.errors import UserError


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
