"""Batches without padding: the real tokens of all samples in one row, and prefix-LM attention sample by sample.

Everything but attention works on single tokens, so padding is not computed at all. Attention meets one sample at a
time: its prompt's keys are seen by all of its tokens, later keys by the tokens after them, and the trained prefix, one
for all samples, by every token.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from chatglm_tuning.allocator import step_empty

_SCORES_AT_ONCE = 2**23  # of all heads: bounds the fp32 scores of a block of queries to 32 MiB


@dataclass(frozen=True)
class Sample:
    """Where a sample stands in the row: tokens start … start + length − 1, of which the first `context` are prompt."""

    start: int
    length: int
    context: int


@dataclass(frozen=True)
class PackedBatch:
    """The real tokens of a batch `(batch, seq)` in one row.

    index: `(tokens,)`, long: where each stands in the flattened batch. shape: `(batch, seq)`.
    """

    index: Tensor
    shape: tuple[int, int]
    samples: tuple[Sample, ...]

    def pack(self, padded: Tensor) -> Tensor:
        """Take the real tokens out of `(batch, seq, …)`: `(1, tokens, …)`."""
        return padded.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, row: Tensor) -> Tensor:
        """Put `(1, tokens, …)` back to its places in `(batch, seq, …)`, with zeros between them."""
        flat = row.new_zeros(self.shape[0] * self.shape[1], *row.shape[2:])
        return flat.index_copy(0, self.index, row[0]).unflatten(0, self.shape)


@dataclass(frozen=True)
class SharedPrefix:
    """A layer's trained key and value, each `(prefix, heads, head_dim)`, which all samples of a batch see.

    dropout: probability with which a number is left out, of all samples alike.
    """

    key: Tensor
    value: Tensor
    dropout: float

    def with_dropout(self) -> tuple[Tensor, Tensor]:
        """Return key and value of one step."""
        return functional.dropout(self.key, self.dropout), functional.dropout(self.value, self.dropout)


def pack_batch(position_ids: Tensor, attention_mask: Tensor | None) -> PackedBatch | None:
    """Find the real tokens of a batch.

    position_ids: `(batch, 2, seq)`; attention_mask: `(batch, seq)`, 1 = a real token, or None (all are).
    Returns None where a prompt is not the beginning of its sample, which only hand-made position ids lead to.
    """
    in_prompt = position_ids[:, 1] == 0
    is_real = torch.ones_like(in_prompt) if attention_mask is None else attention_mask.bool()
    lengths = is_real.sum(dim=-1)
    contexts = (is_real & in_prompt).sum(dim=-1)
    ordinal = is_real.cumsum(dim=-1)
    begins = (is_real & in_prompt) == (is_real & (ordinal <= contexts[:, None]))
    *sizes, is_plain = torch.stack([*lengths, *contexts, begins.all().to(lengths.dtype)]).tolist()
    if not is_plain:
        return None
    samples, start = [], 0
    for length, context in zip(sizes[: len(lengths)], sizes[len(lengths) :], strict=True):
        samples.append(Sample(start, length, context))
        start += length
    index = is_real.flatten().nonzero()[:, 0]
    return PackedBatch(index, (position_ids.shape[0], position_ids.shape[-1]), tuple(samples))


def is_blockwise(states: Tensor) -> bool:
    """Whether `packed_attention` is made for the device and dtype of `states`.

    Elsewhere an attention kernel of torch is faster, or, for fp16 on a CPU, as good.
    """
    return states.device.type == "cpu" and states.dtype in (torch.bfloat16, torch.float32)


def packed_attention(
    fused: Tensor,
    rotary: tuple[Tensor, Tensor],
    prefix: SharedPrefix | None,
    packed: PackedBatch,
) -> Tensor:
    """Prefix-LM attention of every sample over itself and the prefix.

    fused: `(1, tokens, heads, 3 · head_dim)`: per head query, key and value, not rotated yet.
    rotary: of `rotary_angles`, for the packed tokens.
    Scores and their softmax are fp32; of bf16 states the products are those of bf16 values.
    Returns `(1, tokens, heads · head_dim)`. Kept for the backward pass: the arguments, and what dropout keeps.
    """
    if prefix is None:
        return _PackedAttention.apply(fused, *rotary, None, None, None, packed)
    is_kept = None
    if prefix.dropout:
        # One bit for each number of key and value would do; a byte is what masks are made of.
        is_kept = random_mask((2, *prefix.key.shape), prefix.dropout, prefix.key.device)
    kept = None if is_kept is None else (is_kept, 1 / (1 - prefix.dropout) if prefix.dropout < 1 else 0.0)
    return _PackedAttention.apply(fused, *rotary, prefix.key, prefix.value, kept, packed)


def random_mask(shape: Sequence[int], dropout: float, device: torch.device) -> Tensor:
    """Return a random bool tensor that is False with the probability `dropout`, to the nearest of 65536 steps.

    Four numbers are made of each 64 random bits: drawing them is what takes the time.
    """
    count = math.prod(shape)
    least_kept = round(dropout * 2**16) - 2**15
    if least_kept == 2**15:  # no int16 is
        return torch.zeros(tuple(shape), dtype=torch.bool, device=device)
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    return (bits.view(torch.int16)[:count] >= least_kept).view(tuple(shape))


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fused: Tensor,
        cos: Tensor,
        sin: Tensor,
        prefix_key: Tensor | None,
        prefix_value: Tensor | None,
        kept: tuple[Tensor, float] | None,
        packed: PackedBatch,
    ) -> Tensor:
        ctx.save_for_backward(fused, cos, sin, prefix_key, prefix_value, None if kept is None else kept[0])
        ctx.packed, ctx.scale = packed, None if kept is None else kept[1]
        prefix = _thin_out(prefix_key, prefix_value, kept)
        _, tokens, heads, width = fused.shape
        result = step_empty((1, tokens, heads * width // 3), fused)
        context = result.view(tokens, heads, -1)
        with _products_like(fused):
            for sample in packed.samples:
                work = _SampleAttention(fused, cos, sin, prefix, sample)
                for block in work.blocks():
                    seen = work.value[:, : block.keys]
                    context[work.rows][block.queries] = (work.weights(block) @ seen).transpose(0, 1).to(fused.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        fused, cos, sin, prefix_key, prefix_value, is_kept = ctx.saved_tensors
        kept = None if is_kept is None else (is_kept, ctx.scale)
        prefix = _thin_out(prefix_key, prefix_value, kept)
        gradient = gradient.view(fused.shape[1], fused.shape[2], -1)
        fused_gradient = step_empty(fused.shape, fused)
        key_gradient = value_gradient = None
        if prefix_key is not None:
            key_gradient = torch.zeros_like(prefix_key, dtype=torch.float32)
            value_gradient = torch.zeros_like(key_gradient)
        with _products_like(fused):
            for sample in ctx.packed.samples:
                work = _SampleAttention(fused, cos, sin, prefix, sample)
                parts = work.gradients(gradient[work.rows])
                work.write_gradients(parts, fused_gradient)
                if key_gradient is not None and value_gradient is not None:
                    key_gradient += parts[1][:, : work.prefix].transpose(0, 1)
                    value_gradient += parts[2][:, : work.prefix].transpose(0, 1)
        key_gradient, value_gradient = _thin_out(key_gradient, value_gradient, kept)
        return fused_gradient, None, None, key_gradient, value_gradient, None, None


def _thin_out(
    key: Tensor | None, value: Tensor | None, kept: tuple[Tensor, float] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Dropout: what is kept is scaled, the rest 0."""
    if key is None or value is None or kept is None:
        return key, value
    is_kept, scale = kept
    return (key * is_kept[0]).mul_(scale), (value * is_kept[1]).mul_(scale)


@contextmanager
def _products_like(states: Tensor) -> Iterator[None]:
    """Let products of fp32 tensors be those of bf16 values, summed in fp32, where `states` are bf16."""
    settings: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    if states.dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass(frozen=True)
class _Block:
    """Queries of one sample that are taken together, and how many of its keys, prefix included, they may see."""

    queries: slice
    keys: int


class _SampleAttention:
    """The attention of one sample: fp32 query `(heads, tokens, head_dim)` (rotated, scaled), and key and value
    `(heads, prefix + tokens, head_dim)`.
    """

    def __init__(
        self,
        fused: Tensor,
        cos: Tensor,
        sin: Tensor,
        prefix: tuple[Tensor | None, Tensor | None],
        sample: Sample,
    ) -> None:
        _, _, heads, width = fused.shape
        self.sample = sample
        self.rows = slice(sample.start, sample.start + sample.length)
        self.prefix = 0 if prefix[0] is None else len(prefix[0])
        self._scale = (width // 3) ** -0.5
        self._cos, self._sin = cos[0, self.rows].float(), sin[0, self.rows].float()
        query, key, value = fused[0, self.rows].float().chunk(3, dim=-1)
        shape = (heads, self.prefix + sample.length, width // 3)
        self.query = query.new_empty(heads, sample.length, width // 3)
        self.key, self.value = query.new_empty(shape), query.new_empty(shape)
        self._turn(query, self.query.transpose(0, 1), self._sin)
        self._turn(key, self.key[:, self.prefix :].transpose(0, 1), self._sin)
        self.value[:, self.prefix :] = value.transpose(0, 1)
        if prefix[0] is not None and prefix[1] is not None:
            self.key[:, : self.prefix] = prefix[0].transpose(0, 1)
            self.value[:, : self.prefix] = prefix[1].transpose(0, 1)
        self.query.mul_(self._scale)

    def _turn(self, states: Tensor, into: Tensor, sin: Tensor) -> None:
        """Rotate `(tokens, heads, head_dim)` by the angles of `sin` and the cosines, into a tensor of its shape."""
        first, second = states.unflatten(-1, (2, 2, -1)).unbind(dim=-2)
        into_first, into_second = into.unflatten(-1, (2, 2, -1)).unbind(dim=-2)
        torch.mul(first, self._cos, out=into_first).addcmul_(second, sin, value=-1)
        torch.mul(second, self._cos, out=into_second).addcmul_(first, sin)

    def blocks(self) -> Iterator[_Block]:
        """Cut the queries into blocks whose scores are no more than a few megabytes."""
        heads, length = self.query.shape[0], self.sample.length
        step = max(1, _SCORES_AT_ONCE // (heads * (self.prefix + length)))
        for start in range(0, length, step):
            stop = min(start + step, length)
            yield _Block(slice(start, stop), self.prefix + max(self.sample.context, stop))

    def weights(self, block: _Block) -> Tensor:
        """Return what each query of a block takes of each key, `(heads, queries, keys)`, summing to 1."""
        scores = self.query[:, block.queries] @ self.key[:, : block.keys].transpose(1, 2)
        start, stop = block.queries.start, block.queries.stop
        first = max(self.sample.context, start)  # the keys before it are seen by the whole block
        later = block.keys - self.prefix - first
        if later > 0:
            is_later = torch.ones(stop - start, later, dtype=torch.bool).triu(start - first + 1)
            scores[:, :, self.prefix + first :].masked_fill_(is_later, -torch.inf)
        return torch.softmax(scores, dim=-1)

    def gradients(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query (rotated, not scaled), key and value for that of the context.

        gradient: `(tokens, heads, head_dim)`. Returns them in the shapes of the attributes.
        """
        query_gradient, key_gradient, value_gradient = map(torch.zeros_like, (self.query, self.key, self.value))
        for block in self.blocks():
            of_context = gradient[block.queries].transpose(0, 1).float()
            key, value = self.key[:, : block.keys], self.value[:, : block.keys]
            weights = self.weights(block)
            value_gradient[:, : block.keys].baddbmm_(weights.transpose(1, 2), of_context)
            of_weights = of_context @ value.transpose(1, 2)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, torch.float32)
            query_gradient[:, block.queries] = of_scores @ key
            key_gradient[:, : block.keys].baddbmm_(of_scores.transpose(1, 2), self.query[:, block.queries])
        return query_gradient.mul_(self._scale), key_gradient, value_gradient

    def write_gradients(self, gradients: tuple[Tensor, Tensor, Tensor], fused_gradient: Tensor) -> None:
        """Turn the gradients back and write them to the sample's place in the gradient of the fused states."""
        of_query, of_key, of_value = gradients
        rows = torch.empty_like(fused_gradient[0, self.rows], dtype=torch.float32)
        query, key, value = rows.chunk(3, dim=-1)
        self._turn(of_query.transpose(0, 1), query, -self._sin)
        self._turn(of_key[:, self.prefix :].transpose(0, 1), key, -self._sin)
        value.copy_(of_value[:, self.prefix :].transpose(0, 1))
        fused_gradient[0, self.rows] = rows
