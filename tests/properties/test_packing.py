"""The packed formats at any shape, and any bytes in them."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatglm_tuning.quantization.linear import QuantizedLinear
from chatglm_tuning.quantization.packing import dequantize_rows, pack_int4, quantize_rows, unpack_int4
from tests.properties.texts import examples
from tests.quantization.test_packing import quantize_plainly

_SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 12).map(lambda half: 2 * half))
_HALVES = st.floats(-65504, 65504, width=16)
BITS = st.sampled_from([8, 4])


def weights(elements=_HALVES):
    return arrays.arrays(np.float16, _SHAPES, elements=elements).map(torch.from_numpy)


@given(levels=arrays.arrays(np.int8, _SHAPES, elements=st.integers(-8, 7)).map(torch.from_numpy))
@examples(200)
def test_unpacking_undoes_packing(levels):
    even, odd = unpack_int4(pack_int4(levels))
    assert torch.equal(even, levels[:, 0::2])
    assert torch.equal(odd, levels[:, 1::2])


@given(packed=arrays.arrays(np.int8, _SHAPES, elements=st.integers(-128, 127)).map(torch.from_numpy))
@examples(200)
def test_packing_undoes_unpacking_of_any_bytes(packed):
    even, odd = unpack_int4(packed)
    assert min(even.min(), odd.min()) >= -8
    assert max(even.max(), odd.max()) <= 7
    assert torch.equal(pack_int4(torch.stack([even, odd], dim=-1).flatten(1)), packed)


@given(
    weight=weights(st.floats(-60000, 60000, width=16)),
    bits=BITS,
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
@examples(300)
def test_every_weight_gives_what_the_formula_says(weight, bits, dtype):
    weight = weight.to(dtype)  # bf16 rounds what is larger beyond fp16
    stored, scale = quantize_rows(weight, bits)
    expected_stored, expected_scale = quantize_plainly(weight, bits)
    assert torch.equal(stored, expected_stored)
    assert torch.equal(scale, expected_scale)


@given(weight=weights(st.floats(-4, 4, width=16)), bits=BITS)
@examples(300)
def test_what_comes_back_is_half_a_level_away_at_most(weight, bits):
    """And quantising it again changes no level: the largest of a row is a whole one."""
    stored, scale = quantize_rows(weight, bits)
    back = dequantize_rows(stored, scale, bits, torch.float32)
    assert back.shape == weight.shape
    # The scale and the quotient are rounded to fp16: a relative 2 ** -11 of either, and an absolute of subnormals.
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    room = scale.float()[:, None] * 0.5 + largest * 2**-9 + 127 * 2**-25
    assert bool(((back - weight.float()).abs() <= room).all())


@given(weight=weights(st.one_of(_HALVES, st.sampled_from([float("inf"), float("-inf"), float("nan")]))), bits=BITS)
@examples(200)
def test_numbers_that_are_not_finite_show_in_the_scale_of_their_row_alone(weight, bits):
    """By that loading refuses them."""
    _, scale = quantize_rows(weight, bits)
    assert torch.equal(scale.isfinite(), weight.isfinite().all(dim=1))


@given(data=st.data(), bits=BITS, rows=st.integers(1, 6), half=st.integers(1, 8), is_single=st.booleans())
@examples(200)
def test_a_linear_of_any_bytes_is_the_product_with_what_they_stand_for(data, bits, rows, half, is_single):
    columns = 2 * half
    linear = QuantizedLinear(columns, rows, bits, dtype=torch.float32)
    shape = tuple(linear.weight.shape)
    stored = data.draw(arrays.arrays(np.int8, shape, elements=st.integers(-128, 127)))
    scale = data.draw(arrays.arrays(np.float16, (rows,), elements=st.floats(0, 1, width=16)))
    state = {"weight": torch.from_numpy(stored), "weight_scale": torch.from_numpy(scale), "bias": torch.ones(rows)}
    linear.load_state_dict(state)
    states = torch.randn(1 if is_single else 5, columns, generator=torch.Generator().manual_seed(0))
    weight = dequantize_rows(state["weight"], state["weight_scale"], bits, torch.float32)
    with torch.no_grad():
        found = linear(states)
    torch.testing.assert_close(found, states @ weight.T + 1, rtol=1e-5, atol=1e-3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        linear.load_state_dict({**state, "weight_scale": torch.ones(rows + 1).half()})
