"""Next-token cross-entropy that never holds the logits of more than a few positions.

The head is the largest product of a small batch and its logits the largest tensor: 130528 columns in fp32. Chunks of
positions are taken through head, softmax and back at once, and only the gradient of the hidden states is kept.
"""

from typing import Any

import torch
from torch import Tensor

from chatglm_tuning.allocator import step_empty

_POSITIONS_AT_ONCE = 256
_FP32_ROWS_AT_ONCE = 16


def summed_cross_entropy(hidden_states: Tensor, head_weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the summed cross-entropy of `targets` under the logits `hidden_states · head_weightᵀ`, fp32.

    hidden_states: `(labels, hidden)`; head_weight: `(vocab, hidden)`; targets: `(labels,)`, long.
    smoothing: share of the target that is spread over the whole vocabulary.
    The gradient for both tensors is computed in the forward pass, where it is needed at all.
    """
    return _SummedCrossEntropy.apply(hidden_states, head_weight, targets, smoothing)


def _replace_by_gradient(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the summed loss of `(rows, vocab)` logits, fp32, and leave its gradient in their place."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for start in range(0, len(targets), _FP32_ROWS_AT_ONCE):
        part = logits[start : start + _FP32_ROWS_AT_ONCE]
        target = targets[start : start + _FP32_ROWS_AT_ONCE, None]
        log_probabilities = torch.log_softmax(part, dim=-1, dtype=torch.float32)
        total -= (1 - smoothing) * log_probabilities.gather(-1, target).sum()
        if smoothing:
            total -= smoothing * log_probabilities.mean(dim=-1).sum()
        gradient = log_probabilities.exp_()
        if smoothing:
            gradient -= smoothing / gradient.shape[-1]
        gradient.scatter_add_(-1, target, torch.full_like(target, smoothing - 1, dtype=torch.float32))
        part.copy_(gradient)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, head_weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        hidden_gradient = torch.empty_like(hidden_states) if needs_hidden else None
        weight_gradient = torch.zeros_like(head_weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(targets), _POSITIONS_AT_ONCE):
            rows = slice(start, start + _POSITIONS_AT_ONCE)
            states = hidden_states[rows]
            logits = torch.mm(states, head_weight.T, out=step_empty((len(states), len(head_weight)), states))
            total += _replace_by_gradient(logits, targets[rows], smoothing)
            if hidden_gradient is not None:
                torch.matmul(logits, head_weight, out=hidden_gradient[rows])
            if weight_gradient is not None:
                weight_gradient += logits.T @ states
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = head_weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = output_gradients[0]
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * scale.to(hidden_gradient.dtype)
        if weight_gradient is not None:
            weight_gradient = (weight_gradient * scale).to(ctx.weight_dtype)
        return hidden_gradient, weight_gradient, None, None
