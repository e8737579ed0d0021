"""Where weights are unpacked: equal results in every size, and never another weight than the one asked for."""

import pytest
import torch

from chatglm_tuning.quantization import workspace as module
from chatglm_tuning.quantization.linear import QuantizedLinear
from chatglm_tuning.quantization.packing import dequantize_rows, quantize_rows
from chatglm_tuning.quantization.workspace import Workspace, workspace

IN, OUT = 22, 37
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 2e-2},
    torch.float16: {"rtol": 1e-2, "atol": 2e-2},
}


@pytest.fixture(autouse=True)
def restored_size():
    before = workspace.size
    yield
    workspace.set_size(before)


@pytest.fixture
def fills(monkeypatch):
    """The weights that were unpacked, by their number of stored values."""
    filled, unpatched = [], module.spread_int4
    monkeypatch.setattr(module, "spread_int4", lambda part, *out: filled.append(part.numel()) or unpatched(part, *out))
    return filled


def make_linear(bits, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    linear = QuantizedLinear(IN, OUT, bits)
    linear.weight.data, linear.weight_scale.data = quantize_rows(torch.randn(OUT, IN), bits)
    torch.nn.init.normal_(linear.bias)
    return linear.to(dtype)


def run(linear, states, wanted):
    states = states.clone().requires_grad_()
    linear.bias.grad = None
    product = linear(states)
    product.backward(wanted)
    return product.detach(), states.grad, linear.bias.grad


def run_plainly(linear, states, wanted):
    weight = dequantize_rows(linear.weight, linear.weight_scale, linear.bits, torch.float32).to(states.dtype)
    states = states.clone().requires_grad_()
    product = states @ weight.T + linear.bias
    product.backward(wanted)
    return product.detach(), states.grad, linear.bias.grad


# In chunks: one row or column at a time, some with a remainder, and more than there are.
@pytest.mark.parametrize(("size", "chunk"), [*[("chunk", n) for n in (1, 70, 111, 10**6)], ("matrix", 1), ("layer", 1)])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bits", [8, 4])
def test_products_and_gradients_equal_those_of_the_full_weight(bits, dtype, size, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", chunk)
    workspace.set_size(size)
    linear = make_linear(bits, dtype)
    states, wanted = torch.randn(2, 5, IN, dtype=dtype), torch.randn(2, 5, OUT, dtype=dtype)
    linear.bias.grad = None
    expected = [value.clone() for value in run_plainly(linear, states, wanted)]
    for actual, value in zip(run(linear, states, wanted), expected, strict=True):
        scale = value.float().abs().max()
        torch.testing.assert_close(actual.float() / scale, value.float() / scale, **TOLERANCE[dtype])


def test_chunks_are_as_small_as_they_should_be(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 70)
    own = Workspace()
    assert list(own.parts(OUT, IN)) == [slice(0, OUT)]
    own.set_size("chunk")
    parts = list(own.parts(OUT, IN))
    assert [part.stop - part.start for part in parts] == [3] * 12 + [1]
    assert [part.start for part in parts] == list(range(0, OUT, 3))
    linear = make_linear(4)
    for part in parts:
        own.unpack(linear.weight, 4, torch.float32, rows=part)
    assert [buffer.numel() for buffer in own._buffers.values()] == [3 * IN]


def test_a_weight_that_still_stands_is_not_unpacked_again(fills):
    workspace.set_size("matrix")
    first, second = make_linear(4), make_linear(4, seed=1)
    states, wanted = torch.randn(5, IN), torch.randn(5, OUT)
    once = run(first, states, wanted)
    assert len(fills) == 1  # the backward pass finds it
    again = run(first, states, wanted)
    assert len(fills) == 1
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    run(second, states, wanted)
    assert len(fills) == 2
    assert all(torch.equal(a, b) for a, b in zip(once, run(first, states, wanted), strict=True))
    assert len(fills) == 3


def test_a_layer_holds_one_weight_of_each_shape(fills):
    narrow, wide = make_linear(4), QuantizedLinear(2 * IN, OUT, 4)
    for size, most in (("matrix", 4), ("layer", 2)):
        workspace.set_size(size)
        fills.clear()
        for _ in range(2):
            for linear in (narrow, wide):
                linear(torch.randn(5, linear.in_features))
        assert len(fills) == most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("change", ["in place", "replaced", "scale in place"])
def test_a_weight_that_has_changed_is_unpacked_again(bits, dtype, change):
    workspace.set_size("matrix")
    linear, other = make_linear(bits, dtype), make_linear(bits, dtype, seed=1)
    states, wanted = torch.randn(5, IN, dtype=dtype), torch.randn(5, OUT, dtype=dtype)
    before = run(linear, states, wanted)
    if change == "replaced":
        linear.weight.data = other.weight.data
    with torch.no_grad():
        if change == "in place":
            linear.weight.copy_(other.weight)
        elif change == "scale in place":
            linear.weight_scale.mul_(2)
    after = run(linear, states, wanted)
    assert not torch.equal(after[0], before[0])
    workspace.set_size("matrix")
    assert all(torch.equal(a, b) for a, b in zip(run(linear, states, wanted), after, strict=True))


def test_another_weight_at_the_same_address_is_not_mistaken():
    own = Workspace()
    memory = torch.zeros(4, 6, dtype=torch.int8)
    first = memory.view(4, 6)
    own.unpack(first, 8, torch.float32)
    address, version = first.data_ptr(), first._version
    del first
    memory.numpy()[:] = 5  # as another tensor would be made there: torch counts no change
    second = memory.view(4, 6)
    assert (second.data_ptr(), second._version) == (address, version)
    assert (own.unpack(second, 8, torch.float32) == 5).all()


def test_a_smaller_weight_takes_the_buffer_and_the_larger_one_is_unpacked_again():
    own = Workspace()
    large, small = torch.ones(4, 6, dtype=torch.int8), torch.full((2, 3), 7, dtype=torch.int8)
    address = own.unpack(large, 8, torch.float32).data_ptr()
    assert own.unpack(small, 8, torch.float32).data_ptr() == address
    assert torch.equal(own.unpack(large, 8, torch.float32), torch.ones(4, 6))
    part = own.unpack(small, 8, torch.float32, columns=slice(1, 3))
    assert torch.equal(part, torch.full((2, 2), 7.0))
    assert torch.equal(own.unpack(large, 8, torch.float32), torch.ones(4, 6))


def test_dtypes_have_buffers_of_their_own_and_another_size_frees_them():
    own = Workspace()
    weight = torch.ones(4, 6, dtype=torch.int8)
    own.unpack(weight, 8, torch.float32)
    own.unpack(weight, 8, torch.bfloat16)
    assert len(own._buffers) == 2
    own.set_size("layer")
    assert not own._buffers
    assert not own._held
    assert own.size == "layer"


def test_what_was_unpacked_in_inference_mode_can_be_used_outside_it():
    linear, other = make_linear(4), make_linear(4, seed=1)
    workspace.set_size("matrix")
    workspace._buffers.clear()
    with torch.inference_mode():
        linear(torch.randn(9, IN))
    states = torch.randn(9, IN, requires_grad=True)
    other(states).sum().backward()
    assert states.grad is not None
