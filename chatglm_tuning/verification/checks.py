"""What a verification found, line by line."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One line. holds: None where it could not be checked, which is no failure."""

    name: str
    holds: bool | None
    what: str

    @property
    def line(self) -> str:
        """The check as it is printed."""
        status = {True: "holds", False: "FAILED", None: "not seen"}[self.holds]
        return f"{status:<8} {self.name}: {self.what}"
