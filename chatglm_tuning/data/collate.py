"""Rows of token ids to padded batches, and an order of the rows that puts equal lengths together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import Sampler

from chatglm_tuning.data.encode import IGNORED_LABEL

# Rows are sorted by length among this many groups at a time: enough for little padding, few enough that the order
# stays random.
_GROUPS_SORTED_TOGETHER = 50


@dataclass(frozen=True)
class PrefixLMCollator:
    """Pads rows to the longest of the batch: a callable for `DataLoader` and `Trainer`.

    Takes rows with input_ids and labels, `(seq,)` each; other columns are passed over. Returns input_ids, labels and
    attention_mask, all `(batch, seq)` and long. Labels are ignored on padding, where the mask is 0.
    """

    pad_token_id: int
    padding_side: Literal["left", "right"] = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED_LABEL, dtype=torch.long)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            place = slice(0, length) if self.padding_side == "right" else slice(width - length, width)
            input_ids[index, place] = torch.as_tensor(row["input_ids"], dtype=torch.long)
            labels[index, place] = torch.as_tensor(row["labels"], dtype=torch.long)
            attention_mask[index, place] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


class LengthBucketSampler(Sampler[int]):
    """Every row once an epoch, in an order whose consecutive groups of `group_size` rows are of like length.

    The order depends on seed and epoch only, so a resumed run meets the same batches: transformers' own
    LengthGroupedSampler draws from torch's global generator when training, and a run resumed in a later epoch gets
    another order. The groups themselves come in random order, but for the one with the longest row, which is
    first, so that a lack of memory shows at once, and a last group that is not full.

    lengths: tokens of each row; at least one row.
    group_size: rows that run at the same time, the batch size of one process times the number of processes; a batch
        sampler cuts the order into batches, and accelerate deals these out to the processes.
    """

    def __init__(self, lengths: Sequence[int], group_size: int, *, seed: int) -> None:
        self._lengths = torch.as_tensor(lengths, dtype=torch.long)
        self._group_size = group_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of `epoch`, counted from 0; the training loop calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_mix(self._seed, self._epoch))
        shuffled = torch.randperm(len(self._lengths), generator=generator)
        groups: list[torch.Tensor] = []
        for bucket in shuffled.split(self._group_size * _GROUPS_SORTED_TOGETHER):
            by_length = bucket[self._lengths[bucket].argsort(descending=True, stable=True)]
            groups.extend(by_length.split(self._group_size))
        # A short group anywhere but at the end would shift the batches after it out of their groups.
        is_last_full = len(self._lengths) % self._group_size == 0
        full, rest = (groups, []) if is_last_full else (groups[:-1], groups[-1:])
        order = torch.randperm(len(full), generator=generator).tolist()
        if order:
            # The first row of a group is its longest.
            longest = max(order, key=lambda group: int(self._lengths[full[group][0]]))
            order.remove(longest)
            order.insert(0, longest)
        yield from (index for group in [*(full[i] for i in order), *rest] for index in group.tolist())


def _mix(seed: int, epoch: int) -> int:
    """One seed of two numbers; their sum would give epoch 1 of seed 0 the order of epoch 0 of seed 1."""
    return seed * 1_000_003 + epoch
