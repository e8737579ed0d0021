"""How far something slow is: a bar on a terminal, else a line at times."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def showing_progress(what: str, unit: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many more are done.

    what: is done, as "answering". unit: of what is counted, in the plural. done: already before the start.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn(unit))
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            bar = progress.add_task(what, total=total, completed=done)
            yield lambda count: progress.advance(bar, count)
        return
    lines = _ProgressLines(what, unit, total, done)
    yield lines.advance
    lines.finish()


class _RateColumn(TextColumn):
    def __init__(self, unit: str) -> None:
        super().__init__("")
        self._unit = unit

    def render(self, task: Bar) -> Any:
        speed = task.finished_speed or task.speed
        return f"{speed:.1f} {self._unit}/s" if speed else ""


class _ProgressLines:
    """Logs how far a run is, at most every half minute, and at the end what it took."""

    def __init__(self, what: str, unit: str, total: int, done: int) -> None:
        self._what, self._unit = what, unit
        self._total, self._done, self._first = total, done, done
        self._start = self._said = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            rate = self._rate()
            left = (self._total - self._done) / rate
            logger.info(
                "%s: %d of %d %s, %.1f a second, %.0f s left",
                self._what,
                self._done,
                self._total,
                self._unit,
                rate,
                left,
            )

    def finish(self) -> None:
        seconds = time.monotonic() - self._start
        done = self._done - self._first
        unit = self._unit if done != 1 else self._unit.removesuffix("s")
        logger.info("%s: %d %s in %.1f s, %.1f a second", self._what, done, unit, seconds, self._rate())

    def _rate(self) -> float:
        return max(self._done - self._first, 1e-9) / max(time.monotonic() - self._start, 1e-9)
