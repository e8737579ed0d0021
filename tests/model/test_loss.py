"""The memory-lean loss against plain cross-entropy over all logits."""

import pytest
import torch
from torch.nn import functional

from chatglm_tuning.model.loss import summed_cross_entropy


def make_case(dtype, rows=300, vocabulary=101, hidden=16):
    torch.manual_seed(0)
    return (
        torch.randn(rows, hidden).to(dtype),
        torch.randn(vocabulary, hidden).to(dtype),
        torch.randint(vocabulary, (rows,)),
    )


def run(loss_of, states, weight, needs):
    states, weight = states.clone().requires_grad_(needs[0]), weight.clone().requires_grad_(needs[1])
    loss = loss_of(states, weight) / 7
    if any(needs):
        loss.backward()
    return loss.detach(), states.grad, weight.grad


@pytest.mark.parametrize("rows", [0, 1, 128, 300])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_value_and_gradients_equal_the_plain_loss(rows, smoothing, needs):
    states, weight, targets = make_case(torch.float32, rows)

    def plain(states, weight):
        return functional.cross_entropy(states @ weight.T, targets, reduction="sum", label_smoothing=smoothing)

    def lean(states, weight):
        return summed_cross_entropy(states, weight, targets, smoothing)

    for expected, actual in zip(run(plain, states, weight, needs), run(lean, states, weight, needs), strict=True):
        if expected is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_bf16_agrees_within_its_rounding():
    states, weight, targets = make_case(torch.bfloat16)

    def plain(states, weight):
        return functional.cross_entropy((states @ weight.T).float(), targets, reduction="sum")

    def lean(states, weight):
        return summed_cross_entropy(states, weight, targets, 0.0)

    expected, actual = run(plain, states, weight, (True, False)), run(lean, states, weight, (True, False))
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    # The plain path rounds the scaled gradient of the logits, ours the unscaled one: one bf16 rounding apart.
    assert (actual[1].float() - expected[1].float()).norm() < 2**-8 * expected[1].float().norm()


def test_no_more_than_a_chunk_of_logits_is_ever_held():
    states, weight, targets = make_case(torch.float32, rows=4096, vocabulary=4096)
    states.requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        summed_cross_entropy(states, weight, targets, 0.0).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 4 * 128 * 4096 * 4 < 4096 * 4096 * 4
