"""Batches of a fixed number of rows, dealt out to several processes so that every row comes once an epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers.trainer_pt_utils import BatchRebalanceSampler


class SharedBatchSampler(BatchRebalanceSampler):
    """A process's share of the batches of `rows`, an order of row numbers of known length, with `set_epoch` or not.

    Batch k · processes + p is that of process p, as accelerate deals them out. Where the last rows do not fill a batch
    in every process, accelerate begins again with the first ones; here those of the last two rounds are spread evenly
    instead, so that a step has the gradient of one process that has all of its rows. Only where that leaves a process
    without a row (batches of one row, or fewer rows than processes) do some come twice.

    Why it is one of transformers' own batch samplers: see TokenBudgetSampler.
    """

    def __init__(self, rows: Any, batch_size: int, *, processes: int, process: int, drops_last: bool = False) -> None:
        self.epoch = 0
        self._rows = rows
        self._batch_size = batch_size
        self._processes = processes
        self._process = process
        self._drops_last = drops_last

    @property
    def sampler(self) -> "SharedBatchSampler":
        """Itself: where accelerate looks for `set_epoch` beneath a batch sampler that it has wrapped."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`, counted from 0."""
        self.epoch = epoch
        if hasattr(self._rows, "set_epoch"):
            self._rows.set_epoch(epoch)

    def __len__(self) -> int:
        at_once = self._batch_size * self._processes
        return len(self._rows) // at_once if self._drops_last else -(-len(self._rows) // at_once)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self._rows)
        at_once = self._batch_size * self._processes
        rounds = [order[start : start + at_once] for start in range(0, len(self) * at_once, at_once)]
        if len(rounds) > 1 and len(rounds[-1]) < self._processes and self._batch_size > 1:
            rest = rounds[-2] + rounds[-1]
            middle = -(-len(rest) // 2)
            rounds[-2:] = rest[:middle], rest[middle:]
        for rows in rounds:
            yield self._share(rows)

    def _share(self, rows: Sequence[int]) -> list[int]:
        """Return this process's part of the rows of one round, as even as can be."""
        if len(rows) < self._processes:
            return [rows[self._process % len(rows)]]
        least, more = divmod(len(rows), self._processes)
        start = self._process * least + min(self._process, more)
        return list(rows[start : start + least + (self._process < more)])
