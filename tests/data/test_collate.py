"""Padding of batches and the length-bucketed order, alone and under accelerate's sharding."""

from itertools import pairwise

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader

from chatglm_tuning.data.collate import LengthBucketSampler, PrefixLMCollator
from chatglm_tuning.data.encode import IGNORED_LABEL

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [IGNORED_LABEL, 6, 7], "length": 3},
    {"input_ids": [8], "labels": [8], "length": 1},
]


def test_rows_are_padded_to_the_longest_on_the_right():
    batch = PrefixLMCollator(pad_token_id=3)(ROWS)
    assert batch.keys() == {"input_ids", "labels", "attention_mask"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 3, 3]]
    assert batch["labels"].tolist() == [[IGNORED_LABEL, 6, 7], [8, IGNORED_LABEL, IGNORED_LABEL]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_rows_are_padded_on_the_left():
    batch = PrefixLMCollator(pad_token_id=3, padding_side="left")(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [3, 3, 8]]
    assert batch["labels"].tolist() == [[IGNORED_LABEL, 6, 7], [IGNORED_LABEL, IGNORED_LABEL, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def lengths_of(rows):
    return torch.randint(10, 200, (rows,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 1070, 1072])
def test_every_row_comes_once(rows):
    sampler = LengthBucketSampler(lengths_of(rows), 4, seed=42)
    assert len(sampler) == rows
    assert sorted(sampler) == list(range(rows))


def test_the_order_is_that_of_seed_and_epoch_whatever_was_drawn_before():
    def order(seed, epoch):
        sampler = LengthBucketSampler(lengths_of(1070), 4, seed=seed)
        sampler.set_epoch(epoch)
        torch.rand(seed + epoch + 1)
        return list(sampler)

    assert order(42, 1) == order(42, 1)
    assert len({tuple(order(seed, epoch)) for seed in (42, 43) for epoch in (0, 1)}) == 4


def test_rows_of_like_length_meet_in_random_order_and_the_longest_comes_first():
    lengths = lengths_of(1071)
    order = list(LengthBucketSampler(lengths, 4, seed=42))
    groups = [[lengths[i] for i in order[start : start + 4]] for start in range(0, len(order), 4)]
    assert max(groups[0]) == max(lengths)
    assert len(groups[-1]) == 3
    padded = sum(len(group) * max(group) for group in groups)
    assert padded < 1.05 * sum(lengths)
    # Sorted buckets in their own order would fall all the way through a bucket; a random order rises half the time.
    rises = sum(later[0] > former[0] for former, later in pairwise(groups))
    assert 0.4 < rises / (len(groups) - 1) < 0.6


@pytest.mark.parametrize("rows", [64, 1070])
def test_two_processes_share_the_groups_and_no_row_is_lost(rows):
    lengths = lengths_of(rows)

    def batches(rank):
        sampler = LengthBucketSampler(lengths, 2 * 4, seed=1)
        return list(BatchSamplerShard(BatchSampler(sampler, 4, drop_last=False), 2, rank))

    first, second = batches(0), batches(1)
    assert len(first) == len(second)
    dealt = [row for batch in first + second for row in batch]
    assert set(dealt) == set(range(rows))
    assert len(dealt) - rows < 2 * 4
    for one, other in zip(first[:-1], second[:-1], strict=True):
        # Within one step both processes have rows of one group.
        assert min(lengths[i] for i in one) >= max(lengths[i] for i in other)


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_passes_the_epoch_on(processes):
    def rows(epoch):
        sampler = LengthBucketSampler(lengths_of(64), 4 * processes, seed=1)
        loader = DataLoader(list(range(64)), batch_size=4, sampler=sampler, collate_fn=list)
        loader = prepare_data_loader(loader, num_processes=processes, process_index=0, put_on_device=False)
        loader.set_epoch(epoch)
        return list(loader)

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)
