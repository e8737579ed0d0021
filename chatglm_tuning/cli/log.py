"""What the commands log, on standard error."""

import logging
import sys

from chatglm_tuning.wording import printable


class TerminalFormatter(logging.Formatter):
    """Writes out the control characters of what came from files."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return printable(super().format(record))


def log_to_stderr(level: int = logging.INFO, form: str = "%(message)s") -> None:
    """Show what the package and its libraries tell, without what only their authors need."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TerminalFormatter(form))
    logging.basicConfig(level=level, handlers=[handler])
    for noisy in ("accelerate", "datasets", "httpx", "filelock", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
