"""Elementwise work beside the matrix products of a step: fused by torch.compile where a compiler is there.

A kernel has two forms that compute the same. The plain one is made of torch's own operators; the other is written for
torch.compile, which turns it into one pass over memory. Compiling takes seconds and 0.1 GiB in every process: it starts
only for large tensors, and only once `set_compiling` has allowed it.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chatglm_tuning.allocator import step_empty

logger = logging.getLogger(__name__)

# Below this a plain kernel is done sooner than a compiler has started.
_LEAST_ELEMENTS = 2**20
_GELU_SLOPE = 1.5957691216057308  # 2 · sqrt(2 / pi): tanh(u) = 2 · sigmoid(2 u) - 1
_GELU_CUBE = 0.044715

_switch = {"is_on": False}


def set_compiling(is_on: bool) -> None:
    """Choose whether kernels of large tensors are compiled from now on; to begin with they are not."""
    _switch["is_on"] = is_on


def is_compiling() -> bool:
    """Whether kernels of large tensors are compiled."""
    return _switch["is_on"]


class _Kernel:
    """A kernel in its two forms; the first argument says how large the work is."""

    def __init__(self, plain: Callable[..., Any], to_compile: Callable[..., Any]) -> None:
        self._plain = plain
        self._to_compile = to_compile

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self._to_compile, dynamic=True)  # imports the compiler: not before it is wanted

    def __call__(self, first: Tensor, *others: Any) -> Any:
        if not is_compiling() or first.numel() < _LEAST_ELEMENTS:
            return self._plain(first, *others)
        try:
            return self._compiled(first, *others)
        except Exception as error:  # a compiler that is missing or broken shows itself in a dozen ways
            logger.warning("kernels run uncompiled, and slower: torch.compile failed (%s)", type(error).__name__)
            logger.debug("torch.compile", exc_info=error)
            set_compiling(False)
            return self._plain(first, *others)


def _spread_int4_plain(packed: Tensor, even: Tensor, odd: Tensor) -> None:
    levels = packed >> 4
    even.copy_(levels)
    torch.bitwise_left_shift(packed, 4, out=levels)
    odd.copy_(levels.bitwise_right_shift_(4))


def _spread_int4(packed: Tensor, even: Tensor, odd: Tensor) -> None:
    even.copy_((packed >> 4).to(even.dtype))
    odd.copy_(((packed << 4) >> 4).to(odd.dtype))


def _gelu_plain(states: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu.out(states, approximate="tanh", out=out)


def _gelu(states: Tensor, out: Tensor) -> None:
    x = states.float()
    out.copy_((x * torch.sigmoid(_GELU_SLOPE * x * (1 + _GELU_CUBE * x * x))).to(out.dtype))


def _gelu_gradient_plain(states: Tensor, gradient: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(gradient, states, approximate="tanh", grad_input=out)


def _gelu_gradient(states: Tensor, gradient: Tensor, out: Tensor) -> None:
    x = states.float()
    gate = torch.sigmoid(_GELU_SLOPE * x * (1 + _GELU_CUBE * x * x))
    slope = gate + x * gate * (1 - gate) * _GELU_SLOPE * (1 + 3 * _GELU_CUBE * x * x)
    out.copy_((gradient.float() * slope).to(out.dtype))


def _scale_and_shift_plain(product: Tensor, factor: Tensor, shift: Tensor) -> None:
    product.mul_(factor).add_(shift)


def _scale_and_shift(product: Tensor, factor: Tensor, shift: Tensor) -> None:
    product.copy_(product.float() * factor + shift.float())


_scale_and_shift_kernel = _Kernel(_scale_and_shift_plain, _scale_and_shift)
_spread_int4_kernel = _Kernel(_spread_int4_plain, _spread_int4)
_gelu_kernel = _Kernel(_gelu_plain, _gelu)
_gelu_gradient_kernel = _Kernel(_gelu_gradient_plain, _gelu_gradient)


def spread_int4(packed: Tensor, even: Tensor, odd: Tensor) -> None:
    """Write the levels of `packed` into `even` and `odd`, of its shape and any float dtype.

    packed: int8 `(rows, columns)`, each holding the level of an even column in its high half and of the odd one after
        it in the low half.
    """
    _spread_int4_kernel(packed, even, odd)


def scale_and_shift(product: Tensor, factor: Tensor | None, shift: Tensor) -> None:
    """Multiply `product` `(rows, columns)` by `factor`, fp32, if there is one, and add `shift`, both `(columns,)`."""
    if factor is None:
        product.add_(shift)
    else:
        _scale_and_shift_kernel(product, factor, shift)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        out = step_empty(states.shape, states)
        _gelu_kernel(states, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (states,) = ctx.saved_tensors
        out = step_empty(states.shape, states)
        _gelu_gradient_kernel(states, gradient, out)
        return out


def gelu(states: Tensor) -> Tensor:
    """GELU in its tanh form, with its gradient; only `states` is kept for the backward pass."""
    return _Gelu.apply(states)
