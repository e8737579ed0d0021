import ctypes
import logging

import pytest
import torch
from torch import Tensor

from chatglm_tuning.kernels import spread_int4
from chatglm_tuning.quantization import decode
from chatglm_tuning.quantization.decode import MOST_ROWS, few_rows_product
from chatglm_tuning.quantization.packing import dequantize_rows, quantize_rows

# Sums are in fp32 whatever their order; one rounding to bf16 is 2⁻⁹ of the value.
_RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
# Columns and rows that fill whole vectors, one more, a few, and more than one step of four rows.
_SIZES = [(5, 2), (4, 128), (7, 130), (33, 382), (130, 1024)]


@pytest.fixture
def kernels() -> ctypes.CDLL:
    loaded = decode._load_kernels()
    if loaded is None:
        pytest.skip("no C compiler")
    return loaded


def _stored(out: int, columns: int, bits: int) -> tuple[Tensor, Tensor]:
    return quantize_rows(torch.randn(out, columns) * torch.rand(out, 1), bits)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "columns"), _SIZES)
@torch.no_grad()
def test_the_product_is_that_of_the_dequantised_weight(out: int, columns: int, dtype: torch.dtype, bits: int) -> None:
    torch.manual_seed(0)
    weight, scale = _stored(out, columns, bits)
    bias = torch.randn(out, dtype=dtype)
    states = torch.randn(1, 3, columns).to(dtype)
    expected = states.double() @ dequantize_rows(weight, scale, bits, torch.float32).double().T + bias

    product = few_rows_product(states, weight, scale, bias, bits)

    assert product is not None
    assert product.shape == (1, 3, out)
    assert product.dtype == dtype
    torch.testing.assert_close(product.double(), expected, rtol=_RELATIVE[dtype], atol=1e-5)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_every_level_of_every_column_has_its_own_place(bits: int) -> None:
    columns = 256
    levels = (
        torch.arange(-7, 8).repeat(columns, 18)[:, :columns] if bits == 4 else torch.arange(-128, 128).repeat(256, 1)
    )
    weight = ((levels[:, 0::2] << 4) | (levels[:, 1::2] & 15)) if bits == 4 else levels
    weight = weight.to(torch.int8)
    ones, zeros = torch.ones(columns, dtype=torch.float16), torch.zeros(columns)

    for column in range(0, columns, 5):
        states = torch.zeros(1, columns)
        states[0, column] = 1
        product = few_rows_product(states, weight, ones, zeros, bits)
        torch.testing.assert_close(product, levels[:, column].float()[None])


@pytest.mark.usefixtures("kernels")
@torch.no_grad()
def test_one_column_that_outweighs_all_others_costs_no_precision() -> None:
    torch.manual_seed(0)
    weight, scale = _stored(64, 4096, 4)
    states = torch.randn(1, 4096).bfloat16()
    states[0, 17] = 1000
    expected = states.double() @ dequantize_rows(weight, scale, 4, torch.float32).double().T

    product = few_rows_product(states, weight, scale, torch.zeros(64), 4)

    assert product is not None
    torch.testing.assert_close(product.double(), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.usefixtures("kernels")
def test_nothing_is_returned_for_many_rows_or_where_a_gradient_is_wanted() -> None:
    weight, scale = _stored(8, 64, 4)
    bias = torch.zeros(8)

    assert few_rows_product(torch.randn(1, 64), weight, scale, bias, 4) is None
    with torch.no_grad():
        assert few_rows_product(torch.randn(MOST_ROWS + 1, 64), weight, scale, bias, 4) is None
        assert few_rows_product(torch.randn(MOST_ROWS, 64), weight, scale, bias, 4) is not None


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc"])
@torch.no_grad()
def test_a_compiler_that_does_not_work_is_reported_once(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    decode._load_kernels.cache_clear()
    weight, scale = _stored(8, 64, 4)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert few_rows_product(torch.randn(1, 64), weight, scale, torch.zeros(8), 4) is None
    finally:
        decode._load_kernels.cache_clear()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_what_a_gpu_compiles_is_the_same_product(bits: int) -> None:
    torch.manual_seed(0)
    weight, scale = _stored(12, 66, bits)
    states = torch.randn(3, 66)

    product = decode._product_to_compile(states, weight, scale, bits)

    torch.testing.assert_close(product, states @ dequantize_rows(weight, scale, bits, torch.float32).T)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (5, 62), (7, 130), (33, 4096)])
def test_levels_are_written_out_as_torch_does_it(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    stored = torch.randint(-128, 128, (rows + 2, columns), dtype=torch.int8)
    stored[0, :2] = torch.tensor([0x78, -0x78])
    for packed in (stored, stored[1:-1], stored[:, columns // 2 :]):
        expected, actual = (torch.full((len(packed), 2 * packed.shape[1]), 99.0).bfloat16() for _ in range(2))
        spread_int4(packed, *expected.chunk(2, dim=1))
        assert decode.spread_on_cpu(packed, *actual.chunk(2, dim=1))
        assert torch.equal(actual, expected)


def test_other_dtypes_and_layouts_are_spread_by_torch() -> None:
    packed = torch.zeros(4, 8, dtype=torch.int8)
    assert not decode.spread_on_cpu(packed, *torch.zeros(4, 16).chunk(2, dim=1))
    assert not decode.spread_on_cpu(packed.T, *torch.zeros(8, 8).bfloat16().chunk(2, dim=1))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS])
@torch.no_grad()
def test_a_few_rows_meet_the_head_in_fp32(rows: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(77, 4096).bfloat16()
    states = torch.randn(1, rows, 4096).bfloat16()
    product = decode.few_rows_of_head(states, weight)
    assert product is not None
    assert (product.shape, product.dtype) == ((1, rows, 77), torch.bfloat16)
    expected = states.double() @ weight.double().T
    torch.testing.assert_close(product.double(), expected, rtol=_RELATIVE[torch.bfloat16], atol=1e-3)


@pytest.mark.usefixtures("kernels")
def test_the_head_takes_another_way_for_all_else() -> None:
    weight = torch.randn(8, 64).bfloat16()
    assert decode.few_rows_of_head(torch.randn(1, 64).bfloat16(), weight) is None  # a gradient may be wanted
    with torch.no_grad():
        assert decode.few_rows_of_head(torch.randn(1, 64).bfloat16(), weight) is not None
        assert decode.few_rows_of_head(torch.randn(MOST_ROWS + 1, 64).bfloat16(), weight) is None
        assert decode.few_rows_of_head(torch.randn(1, 64), weight.float()) is None
        assert decode.few_rows_of_head(torch.randn(1, 64).bfloat16(), weight.T.contiguous().T) is None
        assert decode.few_rows_of_head(torch.randn(1, 60).bfloat16(), weight[:, :60]) is None
