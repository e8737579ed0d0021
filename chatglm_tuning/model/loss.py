"""Next-token cross-entropy that never holds the logits of more than a few positions.

The head is the largest product of a small batch and its logits the largest tensor: 130528 columns in fp32. Chunks of
positions are taken through head, softmax and back at once, and only the gradient of the hidden states is kept.
"""

from typing import Any

import torch
from torch import Tensor

_POSITIONS_AT_ONCE = 128


def summed_cross_entropy(hidden_states: Tensor, head_weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the summed cross-entropy of `targets` under the logits `hidden_states · head_weightᵀ`, fp32.

    hidden_states: `(labels, hidden)`; head_weight: `(vocab, hidden)`; targets: `(labels,)`, long.
    smoothing: share of the target that is spread over the whole vocabulary.
    The gradient for both tensors is computed in the forward pass, where it is needed at all.
    """
    return _SummedCrossEntropy.apply(hidden_states, head_weight, targets, smoothing)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, head_weight: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden_states.device)
        hidden_gradient = torch.empty_like(hidden_states) if needs_hidden else None
        weight_gradient = torch.zeros_like(head_weight, dtype=torch.float32) if needs_weight else None
        for start in range(0, len(targets), _POSITIONS_AT_ONCE):
            rows = slice(start, start + _POSITIONS_AT_ONCE)
            logits = (hidden_states[rows] @ head_weight.T).float()  # (rows, vocab)
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            at_target = logits.gather(-1, targets[rows, None])
            loss = normaliser - (1 - smoothing) * at_target
            if smoothing:
                loss = loss - smoothing * logits.mean(dim=-1, keepdim=True)
            total += loss.sum()
            if hidden_gradient is None and weight_gradient is None:
                continue
            gradient = logits.sub_(normaliser).exp_()
            if smoothing:
                gradient -= smoothing / gradient.shape[-1]
            gradient.scatter_add_(-1, targets[rows, None], torch.full_like(at_target, smoothing - 1))
            gradient = gradient.to(hidden_states.dtype)
            if hidden_gradient is not None:
                torch.matmul(gradient, head_weight, out=hidden_gradient[rows])
            if weight_gradient is not None:
                weight_gradient += gradient.T @ hidden_states[rows]
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
