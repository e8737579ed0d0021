"""A linear layer whose frozen weight stays int8 or int4 in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chatglm_tuning.allocator import step_empty
from chatglm_tuning.kernels import scale_and_shift
from chatglm_tuning.quantization.decode import few_rows_product
from chatglm_tuning.quantization.workspace import workspace


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
        product = few_rows_product(states, self.weight, self.weight_scale, self.bias, self.bits)
        if product is not None:
            return product
        return _QuantizedProduct.apply(states, self.weight, self.weight_scale, self.bias, self.bits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        scale = self.weight_scale.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float16:
            self.weight_scale.data = scale.to(self.weight_scale.device)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class _QuantizedProduct(torch.autograd.Function):
    """x · (level · scale)ᵀ + bias, keeping nothing for the backward pass but the stored weight.

    The levels of int4 are multiplied with the even columns before the odd ones, which needs no interleaving of the
    weight. The scale multiplies the product, not the weight, but in fp16, where a product of bare levels could
    overflow.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, bits: int) -> Tensor:
        # The weight is frozen: autograd need not watch it, and a recomputed layer can stop before its last product.
        ctx.weight, ctx.scale, ctx.bits = weight, scale, bits
        rows = states.reshape(-1, states.shape[-1])
        if bits == 4:
            rows = _even_before_odd(rows)
        factor, weight_factor = _split_scale(scale, states.dtype)
        result = step_empty((*states.shape[:-1], weight.shape[0]), rows)
        product = result.view(len(rows), -1)
        with workspace.use():
            for part in workspace.parts(*weight.shape):
                matrix = workspace.unpack(weight, bits, rows.dtype, rows=part, scale=weight_factor)
                if matrix.shape[0] == weight.shape[0]:
                    torch.mm(rows, matrix.T, out=product)
                else:
                    product[:, part] = rows @ matrix.T
        scale_and_shift(product, factor, bias)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        weight, bits = ctx.weight, ctx.bits
        rows = gradient.reshape(-1, gradient.shape[-1])
        bias_gradient = rows.sum(dim=0) if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, bias_gradient, None
        factor, weight_factor = _split_scale(ctx.scale, gradient.dtype)
        if factor is not None:
            rows = torch.mul(rows, factor, out=step_empty(rows.shape, rows))
        columns_each = 2 if bits == 4 else 1
        states = step_empty((len(rows), weight.shape[1] * columns_each), rows)
        with workspace.use():
            for part in workspace.parts(weight.shape[1], weight.shape[0] * columns_each):
                matrix = workspace.unpack(weight, bits, rows.dtype, columns=part, scale=weight_factor)
                place = states[:, part.start * columns_each : part.stop * columns_each]
                product = torch.mm(rows, matrix, out=step_empty((len(rows), matrix.shape[1]), rows))
                if bits == 4:
                    product = product.view(len(rows), 2, -1).transpose(1, 2)
                place.view(product.shape).copy_(product)
        return states.view(*gradient.shape[:-1], -1), None, None, bias_gradient, None


def _even_before_odd(rows: Tensor) -> Tensor:
    """Return the even columns of `(rows, columns)`, then the odd ones."""
    split = step_empty(rows.shape, rows)
    split.view(len(rows), 2, -1).copy_(rows.view(len(rows), -1, 2).transpose(1, 2))
    return split


def _split_scale(scale: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Return what the product is multiplied with, and what the levels are; None where that is nothing.

    The factor is fp32 even for bf16 products: a scale rounded to bf16 would shift whole rows by up to 0.2 %.
    """
    return (None, scale) if dtype == torch.float16 else (scale.float(), None)
