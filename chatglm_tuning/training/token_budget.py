"""Batches of as many rows as a number of tokens holds, instead of a fixed number of rows."""

from collections.abc import Iterator, Sequence

import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler

# Rows are sorted by length within windows of about so many batches, so that which rows meet stays random.
_BATCHES_SORTED_TOGETHER = 50


class TokenBudgetSampler(BatchRebalanceSampler):
    """A batch sampler whose batches have at most `budget` tokens; a longer row is a batch of its own.

    Rows of like length share a batch. What is in a batch is drawn once, from the seed, so that every epoch has as many
    batches as the first; their order is drawn anew in every epoch, the heaviest first, so that a lack of memory shows
    at once. Every process gets equally many batches: where they do not divide, some are cut in two, and only where
    none has two rows do some come twice.

    lengths: tokens of each row; at least one row. processes, process: how many share the rows, and which this is.

    It is one of transformers' own batch samplers for no more than this: Trainer gives an instance to the DataLoader as
    it is, and does not let accelerate deal its batches out once more.
    """

    def __init__(self, lengths: Sequence[int], budget: int, *, seed: int, processes: int = 1, process: int = 0) -> None:
        self.epoch = 0
        self.seed = seed
        self._process = process
        self._lengths = list(lengths)  # a column of datasets is slow to index
        batches = _halve_until_divisible(_fill_batches(self._lengths, budget, processes, seed), processes)
        # Batches that run at the same time are of like size.
        batches.sort(key=self._tokens, reverse=True)
        self._rounds = [batches[start : start + processes] for start in range(0, len(batches), processes)]

    @property
    def sampler(self) -> "TokenBudgetSampler":
        """Itself: where accelerate looks for `set_epoch` beneath a batch sampler that it has wrapped."""
        return self

    @property
    def largest_batch(self) -> tuple[int, int]:
        """The most rows and the most tokens of a batch of any process."""
        batches = [batch for group in self._rounds for batch in group]
        return max(map(len, batches)), self._tokens(self._rounds[0][0])

    def __len__(self) -> int:
        return len(self._rounds)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rest = (1 + torch.randperm(len(self._rounds) - 1, generator=generator)).tolist()
        yield from (self._rounds[place][self._process] for place in [0, *rest])

    def _tokens(self, batch: list[int]) -> int:
        return sum(self._lengths[row] for row in batch)


def _fill_batches(lengths: Sequence[int], budget: int, processes: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    rows_per_batch = max(1, budget * len(lengths) // max(1, sum(lengths)))
    window = rows_per_batch * processes * _BATCHES_SORTED_TOGETHER
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        tokens = budget + 1  # a window begins with a batch of its own
        for row in sorted(order[start : start + window], key=lambda row: lengths[row], reverse=True):
            tokens += lengths[row]
            if tokens > budget:
                batches.append([])
                tokens = lengths[row]
            batches[-1].append(row)
    return batches


def _halve_until_divisible(batches: list[list[int]], processes: int) -> list[list[int]]:
    while len(batches) % processes:
        fullest = max(batches, key=len)
        if len(fullest) == 1:
            batches += batches[: -len(batches) % processes]
            continue
        batches.remove(fullest)
        batches += [fullest[::2], fullest[1::2]]
    return batches
