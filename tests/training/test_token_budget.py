"""Batches of a number of tokens: what they hold, alone and dealt out to processes, and through a whole run."""

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from chatglm_tuning.training.token_budget import TokenBudgetSampler

BUDGET = 512


def lengths_of(rows, longest=200):
    return torch.randint(10, longest, (rows,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("rows", [3, 4, 50, 1070])
def test_every_row_comes_once_and_no_batch_is_over_the_budget(rows, processes):
    lengths = lengths_of(rows)
    shares = [TokenBudgetSampler(lengths, BUDGET, seed=1, processes=processes, process=p) for p in range(processes)]
    batches = [batch for share in shares for batch in share]
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert all(0 < sum(lengths[row] for row in batch) <= BUDGET for batch in batches)
    assert {len(list(share)) for share in shares} == {len(shares[0])}


def test_little_of_the_budget_is_left_over():
    lengths = lengths_of(1070)
    batches = list(TokenBudgetSampler(lengths, BUDGET, seed=1))
    assert len(batches) * BUDGET <= 1.25 * sum(lengths)
    spreads = [max(lengths[row] for row in batch) - min(lengths[row] for row in batch) for batch in batches]
    assert sum(spreads) / len(spreads) < 10


def test_a_row_over_the_budget_is_alone():
    batches = list(TokenBudgetSampler([9, 5, 30, 4], 10, seed=0))
    assert sorted(map(sorted, batches)) == [[0], [1, 3], [2]]
    assert batches[0] == [2]


def test_fewer_rows_than_processes_are_repeated():
    shares = [list(TokenBudgetSampler([5, 6], 10, seed=0, processes=3, process=p)) for p in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1]
    assert {row for share in shares for batch in share for row in batch} == {0, 1}


def test_epochs_have_the_same_batches_in_another_order():
    sampler = TokenBudgetSampler(lengths_of(1070), BUDGET, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first != second
    assert sorted(first) == sorted(second)
    assert first[0] == second[0], "the heaviest is first"
    assert sorted(TokenBudgetSampler(lengths_of(1070), BUDGET, seed=2)) != sorted(first)
    assert sampler.largest_batch == (max(map(len, first)), max(sum(lengths_of(1070)[i] for i in b) for b in first))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_epoch_reaches_it_through_accelerate(processes):
    sampler = TokenBudgetSampler(lengths_of(64), BUDGET, seed=1, processes=processes, process=0)
    loader = prepare_data_loader(
        DataLoader(list(range(64)), batch_sampler=sampler, collate_fn=list),
        num_processes=processes,
        process_index=0,
        put_on_device=False,
    )
    loader.set_epoch(3)
    assert sampler.epoch == 3
