"""Errors that a user can act on."""


class UserError(Exception):
    """A mistake in what was given to the program; the command line prints it and exits with code 2.

    what: what was found and what is allowed, one sentence without its full stop.
    remedy: what to do about it, one sentence without its full stop; it is shown with a capital letter.
    where: the file, `file:line` or flag that it concerns, or None.
    """

    def __init__(self, what: str, *, remedy: str, where: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        place = f"{where}: " if where else ""
        super().__init__(f"{place}{what}. {remedy[:1].upper()}{remedy[1:]}.")
