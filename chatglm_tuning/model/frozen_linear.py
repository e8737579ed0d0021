"""A linear layer that costs a training step no more than its two products while its weight is frozen."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from chatglm_tuning.allocator import step_empty


class FrozenLinear(nn.Linear):
    """`nn.Linear` whose frozen weight autograd does not watch.

    A recomputed layer can then stop before its last product, and results may lie on reused memory.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map `(…, in)` to `(…, out)`."""
        is_frozen = not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)
        is_cast = torch.is_autocast_enabled(input.device.type)
        if is_frozen and input.requires_grad and torch.is_grad_enabled() and not is_cast:
            return _FrozenProduct.apply(input, self.weight, self.bias)
        return super().forward(input)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        rows = states.reshape(-1, states.shape[-1])
        product = step_empty((*states.shape[:-1], len(weight)), rows)
        if bias is None:
            torch.mm(rows, weight.T, out=product.view(-1, len(weight)))
        else:
            torch.addmm(bias, rows, weight.T, out=product.view(-1, len(weight)))
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows = gradient.reshape(-1, gradient.shape[-1])
        states = torch.mm(rows, ctx.weight, out=step_empty((len(rows), ctx.weight.shape[1]), rows))
        return states.view(*gradient.shape[:-1], states.shape[1]), None, None
