"""What a check found."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    name: what was looked at. what: what was found, without its full stop.
    code, remedy: the page in docs/errors and what to do, a sentence without its full stop, of all that is not ok.
    """

    status: Status
    name: str
    what: str
    code: str | None = None
    remedy: str | None = None

    @property
    def line(self) -> str:
        """The finding as it is printed."""
        if self.remedy is None:
            return f"{self.status:<8} {self.name}: {self.what}"
        return f"{self.status:<8} {self.name}: {self.what}. {self.remedy} [{self.code}]"


def ok(name: str, what: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding("ok", name, what)


def warning(name: str, what: str, *, code: str, remedy: str) -> Finding:
    """Return a finding that may spoil a run, or slow it."""
    return Finding("warning", name, what, code, remedy)


def problem(name: str, what: str, *, code: str, remedy: str) -> Finding:
    """Return a finding that spoils runs."""
    return Finding("problem", name, what, code, remedy)


def examined(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield what `check` finds; what keeps it from its end is a finding too, so that the others still take place."""
    try:
        yield from check()
    except ImportError as error:
        library = error.name or str(error)
        yield problem(
            name, f"{library} cannot be imported ({error})", code="X102", remedy=f"Install it: pip install {library}"
        )
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        yield warning(
            name,
            f"this could not be looked at ({where}{error.strerror or error})",
            code="X105",
            remedy="See whether this user may read it",
        )
