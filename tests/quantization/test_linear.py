"""The quantised linear against a plain one that holds the dequantised weight."""

import pytest
import torch
from torch import nn

from chatglm_tuning.quantization.linear import QuantizedLinear
from tests.model_folder import dequantize_linear, quantize_linear

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 2e-2},
    torch.float16: {"rtol": 1e-2, "atol": 2e-2},
}


def make_pair(bits, dtype):
    torch.manual_seed(1)
    plain = nn.Linear(32, 24)
    nn.init.normal_(plain.bias)
    quantized = quantize_linear(plain, bits)
    plain.weight.data = dequantize_linear(quantized)
    return plain.to(dtype), quantized.to(dtype)


@pytest.mark.parametrize("bits", [8, 4])
def test_product_equals_the_released_one(golden, bits):
    tensors = golden.tensors("quant")
    linear = QuantizedLinear(32, 16, bits)
    linear.weight.data = tensors["int8/levels_int8"] if bits == 8 else tensors["int4/packed_int8"]
    linear.weight_scale.data = tensors[f"int{bits}/scale_fp16"]
    expected = tensors[f"int{bits}/y_fp32_with_fp32_dequant"]
    torch.testing.assert_close(linear(tensors[f"int{bits}/x_fp32"]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bits", [8, 4])
def test_values_and_gradients_equal_a_plain_linear(bits, dtype):
    plain, quantized = make_pair(bits, dtype)
    states = torch.randn(3, 5, 32, dtype=dtype)
    results = []
    for linear in (plain, quantized):
        x = states.clone().requires_grad_()
        linear.bias.grad = None
        y = linear(x)
        (y.float() ** 2).sum().backward()
        results.append((y.detach(), x.grad, linear.bias.grad))
    for expected, actual in zip(*results, strict=True):
        scale = expected.float().abs().max().item()
        torch.testing.assert_close(actual.float() / scale, expected.float() / scale, **TOLERANCE[dtype])
    assert quantized.weight.grad is None


def test_a_large_activation_does_not_overflow_in_fp16():
    linear = QuantizedLinear(4096, 8, 8, dtype=torch.float16)
    linear.weight.data.fill_(127)
    linear.weight_scale.data.fill_(0.001)
    y = linear(torch.full((1, 4096), 10.0, dtype=torch.float16))
    assert y[0, 0].item() == pytest.approx(4096 * 10 * 0.127, rel=1e-2)


def test_a_cast_leaves_weight_and_scale_as_they_are():
    _, quantized = make_pair(4, torch.float32)
    weight, scale = quantized.weight.clone(), quantized.weight_scale.clone()
    quantized.to(torch.bfloat16).float().half().float()
    assert quantized.bias.dtype == torch.float32
    assert torch.equal(quantized.weight, weight)
    assert torch.equal(quantized.weight_scale, scale)
    assert quantized.weight_scale.dtype == torch.float16


def test_nothing_is_kept_for_the_backward_but_the_stored_weight():
    _, quantized = make_pair(4, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = quantized(torch.randn(5, 32, requires_grad=True))
    assert not kept
    assert y.grad_fn.weight is quantized.weight
