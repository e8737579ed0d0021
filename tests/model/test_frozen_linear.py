"""The linear whose frozen weight autograd does not watch, against torch's own."""

import pytest
import torch
from torch import nn

from chatglm_tuning.model.frozen_linear import FrozenLinear


def make_pair(bias, dtype=torch.float32, trained=()):
    torch.manual_seed(0)
    plain = nn.Linear(24, 16, bias=bias).to(dtype)
    frozen = FrozenLinear(24, 16, bias=bias).to(dtype)
    frozen.load_state_dict(plain.state_dict())
    for linear in (plain, frozen):
        for name, parameter in linear.named_parameters():
            parameter.requires_grad_(name in trained)
    return plain, frozen


def run(linear, states, is_watched=True):
    states = states.clone().requires_grad_(is_watched)
    product = linear(states)
    if product.requires_grad:
        (product.float() ** 2).sum().backward()
    return {"product": product.detach(), "states": states.grad, **{n: p.grad for n, p in linear.named_parameters()}}


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [(), ("weight", "bias"), ("bias",), ("weight",)])
@pytest.mark.parametrize("is_watched", [True, False])
def test_products_and_gradients_equal_those_of_a_plain_linear(shape, bias, dtype, trained, is_watched):
    plain, frozen = make_pair(bias, dtype, trained)
    states = torch.randn(shape, dtype=dtype)
    expected, actual = run(plain, states, is_watched), run(frozen, states, is_watched)
    for name, value in expected.items():
        if value is None:
            assert actual[name] is None, name
        else:
            assert actual[name].dtype == value.dtype
            tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 2e-2}
            torch.testing.assert_close(actual[name], value, **tolerance)
    assert (actual.get("weight") is not None) == ("weight" in trained)


def test_a_gradient_that_is_not_contiguous_is_multiplied_right():
    plain, frozen = make_pair(True)
    states, wanted = torch.randn(2, 5, 24), torch.randn(16, 5, 2).permute(2, 1, 0)
    results = []
    for linear in (plain, frozen):
        leaf = states.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        linear(leaf).backward(wanted)
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_nothing_is_kept_for_the_backward_pass():
    kept = []
    for linear in make_pair(True):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda kept: kept):
            linear(torch.randn(5, 24, requires_grad=True))
        if type(linear) is nn.Linear:
            assert kept
            kept.clear()
    assert not kept


def test_autocast_multiplies_in_its_own_dtype():
    plain, frozen = make_pair(True)
    states = torch.randn(5, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = plain(states), frozen(states)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def test_the_result_may_be_changed_in_place():
    _, frozen = make_pair(True)
    states = torch.randn(2, 5, 24, requires_grad=True)
    product = frozen(states)
    expected = torch.autograd.grad(product.sum() * 2, states)[0]
    (changed,) = torch.autograd.grad(frozen(states).mul_(2).sum(), states)
    torch.testing.assert_close(changed, expected)
