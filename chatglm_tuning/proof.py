"""The proof that what was saved is what was trained: read from disk again, an adapter answers as the live one does.

A few fixed texts go through the model with the live adapter, with the one on disk and with none. The first two must
agree and the third must differ, or the file is not the adapter, or the adapter does nothing.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from chatglm_tuning.adapters.lora import check_lora_tensors, lora_state_dict, read_lora_config
from chatglm_tuning.adapters.ptuning import check_prefix_fits
from chatglm_tuning.checkpoint import read_lora, read_prefix
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration

_PROBE_TOKENS = 24
RECORDED = 8
"""Positions at the end of the probe whose logits stand in a manifest."""
_ALLOWED_SHARE = 1e-6
"""Of the largest logit: what two passes over the same values may differ by on a GPU."""


@dataclass(frozen=True)
class Proof:
    """What the three passes gave. Gaps: the largest difference of a logit, over the largest logit.

    answer: the likeliest token after every one of the probe's last positions, of the adapter that was read.
    logits, base_logits: their logits, with the adapter and without. dtype: what was computed in. is_finite: whether all
    logits of the live adapter are.
    """

    gap_to_live: float
    gap_to_base: float
    answer: Sequence[int]
    logits: Sequence[float]
    base_logits: Sequence[float]
    dtype: str
    is_finite: bool

    @property
    def equals_live(self) -> bool:
        """Whether the adapter on disk is the live one."""
        return self.gap_to_live <= _ALLOWED_SHARE

    @property
    def differs_from_base(self) -> bool:
        """Whether the adapter changes anything."""
        return self.gap_to_base > _ALLOWED_SHARE

    def describe(self) -> dict[str, Any]:
        """Return what stands in a manifest."""
        return {
            "equals_live": self.equals_live,
            "differs_from_base": self.differs_from_base,
            "gap_to_live": self.gap_to_live,
            "gap_to_base": self.gap_to_base,
            "answer": list(self.answer),
            "logits": list(self.logits),
            "base_logits": list(self.base_logits),
            "dtype": self.dtype,
        }


def prove(model: nn.Module, folder: Path) -> Proof:
    """Compare the adapter in `folder` with the live one of `model`, a LoRA or a prefix, which is left as it was.

    The values on disk are put in the place of the live ones, which are first made NaN, so that one that is not read
    shows. Raises UserError where the folder holds no whole adapter.
    """
    with torch.no_grad(), _evaluating(model):
        live = probe_logits(model)
        with _from_disk(model, folder):
            read = probe_logits(model)
        base = logits_without_adapter(model)
    best = read[-RECORDED:].max(dim=-1)
    of_base = base[-RECORDED:].gather(-1, best.indices[:, None])[:, 0]
    return Proof(
        gap_between(read, live),
        gap_between(read, base),
        best.indices.tolist(),
        _rounded(best.values),
        _rounded(of_base),
        str(next(model.parameters()).dtype).removeprefix("torch."),
        bool(live.isfinite().all()),
    )


def _rounded(logits: Tensor) -> list[float]:
    return [round(value, 6) for value in logits.tolist()]


def gap_between(logits: Tensor, others: Tensor) -> float:
    """Return the largest difference over the largest logit; infinite where a value is not finite."""
    gap = (logits - others).abs().max() / others.abs().max().clamp_min(1e-30)
    return float(gap) if torch.isfinite(gap) else float("inf")


def probe_logits(model: nn.Module) -> Tensor:
    """Return the logits `(seq, vocab)` of a fixed row of tokens, float32, on the CPU."""
    config = cast("ChatGLMConfig", cast("Any", model).config)
    device = next(model.parameters()).device
    # Spread over the vocabulary, whatever its size; the last two are those that stand before an answer.
    ordinary = [
        (7 + 613 * index) % (min(config.bos_token_id, config.gmask_token_id) - 1) for index in range(_PROBE_TOKENS)
    ]
    ids = torch.tensor([[*ordinary, config.gmask_token_id, config.bos_token_id, *ordinary[:RECORDED]]], device=device)
    return cast("Any", model)(input_ids=ids, use_cache=False).logits[0].float().cpu()


def logits_without_adapter(model: nn.Module) -> Tensor:
    """Return `probe_logits` of the base alone."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            return probe_logits(model)
    transformer = cast("ChatGLMForConditionalGeneration", model).transformer
    encoder, transformer.prefix_encoder = transformer.prefix_encoder, None
    try:
        return probe_logits(model)
    finally:
        transformer.prefix_encoder = encoder


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _from_disk(model: nn.Module, folder: Path) -> Iterator[None]:
    """Give the live adapter the values, and the scale, that are in `folder`; the live ones come back afterwards."""
    trained = {name: parameter for name, parameter in model.named_parameters() if _is_adapter(name)}
    kept = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.fill_(float("nan"))
    try:
        if isinstance(model, PeftModel):
            _load_lora(model, folder)
            with _scaled_as(model, folder):
                yield
        else:
            _load_prefix(cast("ChatGLMForConditionalGeneration", model), folder)
            yield
    finally:
        for name, parameter in trained.items():
            parameter.copy_(kept[name])


def _is_adapter(name: str) -> bool:
    return ".lora_" in name or ".prefix_encoder." in name or name.startswith("prefix_encoder.")


@contextmanager
def _scaled_as(model: PeftModel, folder: Path) -> Iterator[None]:
    """Scale the live LoRA as the configuration in `folder` says."""
    config = read_lora_config(folder)
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    linears = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kept = [dict(linear.scaling) for linear in linears]
    for linear in linears:
        linear.scaling.update(dict.fromkeys(linear.scaling, scale))
    try:
        yield
    finally:
        for linear, scaling in zip(linears, kept, strict=True):
            linear.scaling.update(scaling)


def _load_lora(model: PeftModel, folder: Path) -> None:
    tensors = read_lora(folder)
    check_lora_tensors(lora_state_dict(model), tensors, str(folder))
    set_peft_model_state_dict(model, tensors)


def _load_prefix(model: ChatGLMForConditionalGeneration, folder: Path) -> None:
    config = cast("ChatGLMConfig", model.config)
    shape, tensors = read_prefix(folder)
    check_prefix_fits(config, shape, tensors, str(folder))
    assert model.transformer.prefix_encoder is not None
    model.transformer.prefix_encoder.load_state_dict(tensors)
