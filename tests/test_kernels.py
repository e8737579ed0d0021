"""The two forms of every kernel, and what happens where nothing can be compiled."""

import logging

import pytest
import torch
from torch.nn import functional

from chatglm_tuning import kernels
from chatglm_tuning.kernels import gelu, scale_and_shift, set_compiling, spread_int4
from chatglm_tuning.quantization.packing import unpack_int4

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6},
    torch.float16: {"rtol": 2**-9, "atol": 1e-5},
}


def can_compile() -> bool:
    """Whether torch.compile works here at all, by a function that is none of ours."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(4))
    except Exception:
        return False
    return True


@pytest.fixture(scope="module")
def compiler():
    if not can_compile():
        pytest.skip("torch.compile does not work on this machine")


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Begin and end uncompiled, and take every tensor for a large one."""
    monkeypatch.setattr(kernels, "_LEAST_ELEMENTS", 1)
    before = kernels.is_compiling()
    set_compiling(False)
    yield
    set_compiling(before)


def in_both_forms(work, caplog):
    """Return what `work` returns with plain kernels and with compiled ones."""
    set_compiling(False)
    plain = work()
    set_compiling(True)
    with caplog.at_level(logging.WARNING):
        compiled = work()
    assert kernels.is_compiling(), caplog.text
    return plain, compiled


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_spreading_of_int4_is_the_plain_one(dtype, caplog):
    packed = torch.arange(-128, 128, dtype=torch.int8).repeat(3, 1)
    levels = unpack_int4(packed)

    def work():
        # Halves of one matrix, as the workspace gives them.
        matrix = torch.full((3, 512), 99, dtype=dtype)
        spread_int4(packed, *matrix.chunk(2, dim=1))
        return matrix

    for matrix in in_both_forms(work, caplog):
        assert torch.equal(matrix, torch.cat(levels, dim=1).to(dtype))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gelu_is_the_plain_one_with_its_gradient(dtype, caplog):
    torch.manual_seed(0)
    states = torch.cat([3 * torch.randn(1, 30, 16), torch.tensor([-1e4, -9.0, 0.0, 9.0, 1e4]).expand(1, 16, 5).mT], 1)
    wanted = torch.randn_like(states).to(dtype)

    def work():
        leaf = states.to(dtype).requires_grad_()
        out = gelu(leaf)
        return out.detach(), *torch.autograd.grad(out, leaf, wanted)

    for plain, compiled in zip(*in_both_forms(work, caplog), strict=True):
        assert compiled.dtype == dtype
        torch.testing.assert_close(compiled, plain, **TOLERANCE[dtype])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_scaling_is_the_plain_one(dtype, caplog):
    torch.manual_seed(0)
    product, factor, shift = torch.randn(7, 9).to(dtype), torch.rand(9), torch.randn(9).to(dtype)

    def work():
        result = product.clone()
        scale_and_shift(result, factor, shift)
        return result

    plain, compiled = in_both_forms(work, caplog)
    # The plain one rounds the scaled product before it adds.
    tolerance = {"rtol": 2**-6, "atol": 2**-7} if dtype == torch.bfloat16 else TOLERANCE[dtype]
    torch.testing.assert_close(compiled, plain, **tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gelu_is_torch_s_in_its_tanh_form(dtype):
    torch.manual_seed(0)
    leaf = torch.randn(2, 5, 16).to(dtype).requires_grad_()
    expected = functional.gelu(leaf, approximate="tanh")
    wanted = torch.randn_like(expected)
    actual = gelu(leaf)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaf, wanted), torch.autograd.grad(expected, leaf, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("has_factor", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_scaling_multiplies_and_then_adds(dtype, has_factor):
    torch.manual_seed(0)
    product, factor, shift = torch.randn(7, 9).to(dtype), torch.rand(9), torch.randn(9).to(dtype)
    expected = product.double() * (factor.double() if has_factor else 1) + shift.double()
    scale_and_shift(product, factor if has_factor else None, shift)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(product.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_compiler_that_fails_is_told_of_once_and_the_results_are_right(monkeypatch, caplog):
    tries = []

    def broken(*_args, **_settings):
        tries.append(1)
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    kernel = kernels._Kernel(kernels._spread_int4_plain, kernels._spread_int4)
    other = kernels._Kernel(kernels._gelu_plain, kernels._gelu)
    set_compiling(True)
    packed, states = torch.arange(-128, 128, dtype=torch.int8)[None], torch.randn(3, 4)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            even, odd, out = torch.empty(1, 256), torch.empty(1, 256), torch.empty(3, 4)
            kernel(packed, even, odd)
            other(states, out)
            assert torch.equal(torch.stack([even, odd]), torch.stack(unpack_int4(packed)).float())
            torch.testing.assert_close(out, functional.gelu(states, approximate="tanh"))
    assert len(tries) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "torch.compile failed (RuntimeError)" in caplog.text
    assert not kernels.is_compiling()


def test_a_compiler_that_fails_at_the_first_call_is_told_of_too(monkeypatch, caplog):
    def compile_later(function, **_settings):
        def broken(*_given):
            raise OSError("the compiler was not found")

        return broken

    monkeypatch.setattr(torch, "compile", compile_later)
    kernel = kernels._Kernel(kernels._gelu_plain, kernels._gelu)
    set_compiling(True)
    states, out = torch.randn(3, 4), torch.empty(3, 4)
    with caplog.at_level(logging.WARNING):
        kernel(states, out)
    torch.testing.assert_close(out, functional.gelu(states, approximate="tanh"))
    assert "(OSError)" in caplog.text


def test_only_large_tensors_are_compiled_and_only_when_it_is_allowed(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_settings: lambda *given: compiled.append(function))
    monkeypatch.setattr(kernels, "_LEAST_ELEMENTS", 12)
    kernel = kernels._Kernel(kernels._gelu_plain, kernels._gelu)
    small, large = torch.randn(11), torch.randn(12)
    kernel(large, torch.empty(12))
    set_compiling(True)
    kernel(small, torch.empty(11))
    assert not compiled
    kernel(large, torch.empty(12))
    assert compiled == [kernels._gelu]
