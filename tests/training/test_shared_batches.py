"""Batches of a fixed number of rows for several processes: every row once, and as accelerate deals out full ones."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from chatglm_tuning.data.collate import LengthBucketSampler
from chatglm_tuning.training.shared_batches import SharedBatchSampler


def shares(rows, size, processes, **settings):
    return [list(SharedBatchSampler(rows, size, processes=processes, process=p, **settings)) for p in range(processes)]


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("count", range(8, 60, 3))
def test_every_row_comes_once_and_every_process_has_as_many_batches(count, size, processes):
    found = shares(range(count), size, processes)
    assert sorted(row for share in found for batch in share for row in batch) == list(range(count))
    assert {len(share) for share in found} == {-(-count // (size * processes))}
    assert all(0 < len(batch) <= size for share in found for batch in share)


@pytest.mark.parametrize("processes", [2, 3])
def test_full_batches_are_those_that_accelerate_deals_out(processes):
    rows = range(processes * 4 * 5)
    theirs = [list(BatchSamplerShard(BatchSampler(rows, 4, False), processes, p)) for p in range(processes)]
    assert shares(rows, 4, processes) == theirs


def test_a_step_has_the_rows_of_one_process_that_accumulates_as_much():
    one = [list(rows) for rows in BatchSampler(range(22), 6, False)]
    assert [sorted(a + b) for a, b in zip(*shares(range(22), 3, 2), strict=True)] == one


@pytest.mark.parametrize(("count", "size", "processes"), [(5, 1, 2), (2, 4, 3)])
def test_where_a_process_would_have_none_some_rows_come_twice(count, size, processes):
    found = shares(range(count), size, processes)
    assert {row for share in found for batch in share for row in batch} == set(range(count))
    assert len({len(share) for share in found}) == 1


def test_the_last_rows_may_be_dropped():
    found = shares(range(22), 3, 2, drops_last=True)
    assert sorted(row for share in found for batch in share for row in batch) == list(range(18))


def test_epochs_have_the_order_of_their_sampler():
    lengths = torch.randint(5, 50, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    sampler = SharedBatchSampler(LengthBucketSampler(lengths, 8, seed=1), 4, processes=2, process=0)
    first = list(sampler)
    sampler.sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
