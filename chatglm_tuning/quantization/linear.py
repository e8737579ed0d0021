"""A linear layer whose frozen weight stays int8 or int4 in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chatglm_tuning.quantization.packing import unpack_int4


class QuantizedLinear(nn.Module):
    """y = x · (level · scale)ᵀ + bias, in the dtype of x, with a gradient for x and the bias alone.

    weight: int8 `(out, in)` for 8 bits, `(out, in / 2)` for 4; weight_scale: fp16 `(out,)`, which no cast of the
    module to another dtype changes; bias: `(out,)`.
    """

    def __init__(self, in_features: int, out_features: int, bits: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"bits is 4 or 8, not {bits}")
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        stored = in_features // 2 if bits == 4 else in_features
        self.weight = nn.Parameter(torch.zeros(out_features, stored, dtype=torch.int8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.zeros(out_features, dtype=torch.float16), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype))

    def forward(self, states: Tensor) -> Tensor:
        """Map `(…, in)` to `(…, out)`."""
        product = _QuantizedProduct.apply(states, self.weight, self.weight_scale, self.bits)
        return product + self.bias.to(states.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        scale = self.weight_scale.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float16:
            self.weight_scale.data = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class _QuantizedProduct(torch.autograd.Function):
    """x · (level · scale)ᵀ, keeping only the stored weight for the backward pass.

    int4 is multiplied as two products over the even and the odd columns, which need no interleaving. The scale
    multiplies the product, not the weight, but in fp16, where a product of bare levels could overflow.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bits = bits
        factor = _output_factor(scale, states.dtype)
        if bits == 8:
            product = states @ _level_matrix(weight, scale, states.dtype).T
        else:
            even, odd = unpack_int4(weight)
            product = states[..., 0::2] @ _level_matrix(even, scale, states.dtype).T
            product += states[..., 1::2] @ _level_matrix(odd, scale, states.dtype).T
        return product if factor is None else product.mul_(factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        factor = _output_factor(scale, gradient.dtype)
        if factor is not None:
            gradient = (gradient * factor).to(gradient.dtype)
        if ctx.bits == 8:
            return gradient @ _level_matrix(weight, scale, gradient.dtype), None, None, None
        even, odd = unpack_int4(weight)
        states = gradient.new_empty(*gradient.shape[:-1], weight.shape[1] * 2)
        states[..., 0::2] = gradient @ _level_matrix(even, scale, gradient.dtype)
        states[..., 1::2] = gradient @ _level_matrix(odd, scale, gradient.dtype)
        return states, None, None, None


def _output_factor(scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    # fp32 even for bf16 products: a scale rounded to bf16 would shift whole rows by up to 0.2 %.
    return None if dtype == torch.float16 else scale.float()


def _level_matrix(levels: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    matrix = levels.to(dtype)
    return matrix.mul_(scale[:, None]) if dtype == torch.float16 else matrix
