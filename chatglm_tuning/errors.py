"""Errors that a user can act on."""

from collections.abc import Callable
from functools import partial
from typing import Any


class UserError(Exception):
    """A mistake in what was given to the program; the command line prints it and exits with code 2.

    what: what was found and what is allowed, one sentence without its full stop.
    code: which kind of mistake it is, a letter for its area and three digits; docs/errors has a page for each.
    remedy: what to do about it, one sentence without its full stop; it is shown with a capital letter.
    where: the file, `file:line` or flag that it concerns, or None.
    """

    def __init__(self, what: str, *, code: str, remedy: str, where: str | None = None) -> None:
        self.what = what
        self.code = code
        self.where = where
        self.remedy = remedy
        place = f"{where}: " if where else ""
        super().__init__(f"{place}{what}. {remedy[:1].upper()}{remedy[1:]}.")

    def __reduce__(self) -> tuple[Callable[[], "UserError"], tuple[()], dict[str, Any]]:
        # An exception is pickled by its positional arguments alone, and would not come back from another process.
        rebuild = partial(type(self), self.what, code=self.code, remedy=self.remedy, where=self.where)
        return rebuild, (), self.__dict__

    def for_terminal(self) -> str:
        """Return the line that a command prints: the message with its code, and where that is explained."""
        return f"error [{self.code}]: {self} (chatglm-tuning doctor {self.code} explains)"
