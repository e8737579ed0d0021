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


def quantize_plainly(weight, bits):
    """The formula of `quantize_rows` as it is written there."""
    largest = {8: 127, 4: 7}[bits]
    weight = weight.half().float()
    scale = (weight.abs().amax(dim=1) / largest).half()
    quotient = (weight / scale.float()[:, None]).half().float()
    levels = torch.where(scale[:, None] == 0, 0.0, quotient).round().clamp(-largest, largest).to(torch.int8)
    return (pack_int4(levels) if bits == 4 else levels), scale


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
# The smallest ones give scales that fp16 holds with a few bits, or not at all.
@pytest.mark.parametrize("size", [1e-8, 1e-7, 1e-6, 1e-5, 0.02, 100])
def test_every_size_of_weight_gives_what_the_formula_says(bits, dtype, size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(500, 64, generator=generator)
    weight[1::2].uniform_(-1, 1, generator=generator)
    weight = (weight * size).to(dtype)
    for actual, expected in zip(quantize_rows(weight, bits), quantize_plainly(weight, bits), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_halves_go_to_the_even_level(bits, largest):
    halves = torch.arange(-2 * largest, 2 * largest + 1).half() / 2
    weight = torch.cat([halves, halves.flip(0), torch.tensor([largest] * 2)])[None].half()
    packed, scale = quantize_rows(weight, bits)
    assert scale.item() == 1
    levels = packed if bits == 8 else torch.stack(unpack_int4(packed), dim=-1).flatten(1)
    assert torch.equal(levels, weight.round().to(torch.int8))


def test_every_finite_half_gives_what_the_formula_says():
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    values = values[values.isfinite()]
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    for weight in (values.view(-1, 64), values[order].view(-1, 64)):
        for bits in (8, 4):
            for actual, expected in zip(quantize_rows(weight, bits), quantize_plainly(weight, bits), strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [8, 4])
def test_threads_share_a_large_weight(bits, threads):
    weight = torch.randn(1031, 1024, generator=torch.Generator().manual_seed(0)).half()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = quantize_rows(weight, bits)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for tensor, expected in zip(actual, quantize_plainly(weight, bits), strict=True):
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_many_rows_are_quantised_as_one_by_one(bits):
    weight = torch.randn(2500, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(torch.bfloat16)
    packed, scale = quantize_rows(weight, bits)
    for row in (0, 1023, 1024, 2499):
        one_packed, one_scale = quantize_rows(weight[row : row + 1], bits)
        assert torch.equal(packed[row : row + 1], one_packed)
        assert torch.equal(scale[row : row + 1], one_scale)
