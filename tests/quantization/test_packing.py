"""The int8 and int4 format against the released kernels' values."""

import hashlib

import pytest
import torch

from chatglm_tuning.quantization.packing import dequantize_rows, pack_int4, quantize_rows, unpack_int4


@pytest.mark.parametrize("bits", [8, 4])
def test_levels_scales_and_bytes_equal_the_released_kernels(golden, bits):
    tensors = golden.tensors("quant")
    weight, scale = quantize_rows(tensors["weight_fp16"], bits)
    assert torch.equal(scale, tensors[f"int{bits}/scale_fp16"])
    levels = weight if bits == 8 else torch.stack(unpack_int4(weight), dim=-1).flatten(1)
    assert torch.equal(levels, tensors[f"int{bits}/levels_int8"])
    if bits == 4:
        assert torch.equal(weight, tensors["int4/packed_int8"])
        assert weight[0].numpy().tobytes().hex() == golden.json("quant")["int4_row0_hex"]
    for dtype, name in [(torch.float16, "dequant_fp16"), (torch.float32, "dequant_fp32")]:
        assert torch.equal(dequantize_rows(weight, scale, bits, dtype), tensors[f"int{bits}/{name}"])


def test_every_quantised_tensor_of_the_tiny_model_has_the_released_digest(golden):
    weights = golden.tensors("tiny_weights_fp16")
    digests = golden.json("quant")["tiny_model_digests"]
    assert len(digests) == 24
    for key, expected in digests.items():
        name, kind = key.split("|")
        packed, scale = quantize_rows(weights[name], int(kind[3:]))
        assert list(packed.shape) == expected["shape"]
        assert hashlib.sha256(packed.numpy().tobytes()).hexdigest() == expected["packed_sha256"], key
        assert hashlib.sha256(scale.numpy().tobytes()).hexdigest() == expected["scale_sha256"], key


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_of_zeros_becomes_zeros(bits):
    weight = torch.zeros(2, 8, dtype=torch.float16)
    weight[1, 3] = 0.5
    packed, scale = quantize_rows(weight, bits)
    assert scale[0] == 0
    assert torch.equal(dequantize_rows(packed, scale, bits, torch.float32)[0], torch.zeros(8))
    assert dequantize_rows(packed, scale, bits, torch.float32)[1, 3].item() == pytest.approx(0.5, rel=1e-3)


def test_packing_is_undone_by_unpacking_for_every_pair_of_levels():
    grid = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    even, odd = unpack_int4(pack_int4(grid))
    assert torch.equal(even[:, 0], grid[:, 0])
    assert torch.equal(odd[:, 0], grid[:, 1])


@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_are_quantised_as_one_by_one(bits):
    weight = torch.randn(2500, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(torch.bfloat16)
    packed, scale = quantize_rows(weight, bits)
    for row in (0, 1023, 1024, 2499):
        one_packed, one_scale = quantize_rows(weight[row : row + 1], bits)
        assert torch.equal(packed[row : row + 1], one_packed)
        assert torch.equal(scale[row : row + 1], one_scale)
