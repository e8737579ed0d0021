"""Whether an adapter answers as it did when it was saved, and the batch that stopped a run."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from chatglm_tuning.adapters.ptuning import PREFIX_KEY
from chatglm_tuning.checkpoint import Method, read_lora, read_prefix
from chatglm_tuning.loading import Base, add_prefix, add_trained_lora, first_not_finite
from chatglm_tuning.proof import Proof, prove
from chatglm_tuning.small_json import read_small_json
from chatglm_tuning.training.replay import find_first
from chatglm_tuning.training.stopped import BATCH_FILE, REPORT_FILE, read_micro_batch
from chatglm_tuning.verification.checks import Check
from chatglm_tuning.verification.recorded import RecordedProof
from chatglm_tuning.wording import told_precision

_NOISE = {"float32": 1e-4}
"""What the recorded logits may differ by on another machine, over the largest one; half precision has more."""
_NOISE_OF_HALF = 2e-2


def add_adapter(base: Base, folder: Path, method: Method, *, is_trainable: bool) -> nn.Module:
    """Return the base with the adapter of `folder`, read as every other command reads it."""
    if method == "lora":
        return add_trained_lora(base, folder, is_trainable=is_trainable)
    add_prefix(base, None, folder)
    base.model.get_submodule(PREFIX_KEY.removesuffix(".")).requires_grad_(is_trainable)
    return base.model


def check_adapter_values(folder: Path, method: Method) -> Check:
    """See whether every value of the adapter in `folder` is finite."""
    bad = first_not_finite(read_lora(folder) if method == "lora" else read_prefix(folder)[1])
    what = "all are finite" if bad is None else f"{bad} holds values that are not finite"
    return Check("values of the adapter", bad is None, what)


def check_adapter(
    model: nn.Module, folder: Path, recorded: RecordedProof | None, quantization_bit: int | None
) -> Iterator[Check]:
    """Repeat the proof that was made when the adapter was saved, and compare with what was recorded then.

    quantization_bit: that the base of `model` is held in, None in full precision.
    """
    proof = prove(model, folder)
    yield Check(
        "read twice",
        proof.equals_live,
        "the adapter loaded and the adapter read again answer alike"
        if proof.equals_live
        else f"the adapter loaded and the adapter read again differ by {proof.gap_to_live:.2g} of the largest logit",
    )
    yield Check(
        "differs from the base",
        proof.differs_from_base,
        f"by {proof.gap_to_base:.2g} of the largest logit" if proof.differs_from_base else "it changes nothing",
    )
    yield _check_record(proof, recorded, quantization_bit)


def _check_record(proof: Proof, recorded: RecordedProof | None, quantization_bit: int | None) -> Check:
    name = "answers as when it was saved"
    if recorded is None:
        return Check(name, None, "nothing was recorded then")
    if recorded.quantization_bit != quantization_bit:
        then, now = told_precision(recorded.quantization_bit), told_precision(quantization_bit)
        return Check(name, None, f"it was recorded on a base {then}, and this one is {now}")
    if recorded.dtype != proof.dtype:
        return Check(name, None, f"it was recorded in {recorded.dtype}, and this is {proof.dtype}")
    then, now, of_base = (
        torch.tensor(list(logits), dtype=torch.float32)
        for logits in (recorded.logits, proof.logits, recorded.base_logits)
    )
    largest = then.abs().max().clamp_min(1e-30)
    gap, effect = float((then - now).abs().max() / largest), float((then - of_base).abs().max() / largest)
    noise = _NOISE.get(proof.dtype, _NOISE_OF_HALF)
    what = f"the recorded logits differ by {gap:.2g} of the largest"
    if effect / 2 < gap <= noise:
        return Check(name, None, f"{what}, which is rounding or all of what so faint an adapter does ({effect:.2g})")
    return Check(name, gap <= noise, what)


def has_stopped_step(folder: Path) -> bool:
    """Whether `folder` is what a run has left that a number which is not finite has stopped."""
    return (folder / BATCH_FILE).is_file() and (folder / REPORT_FILE).is_file()


def repeat_stopped_step(model: nn.Module, folder: Path) -> Check:
    """Compute the micro-batch again that stopped a run; `model` must have the adapter as it was, trainable."""
    name = "the batch that stopped the run"
    device = next(model.parameters()).device
    try:
        where = _describe_step(folder)
        batch = read_micro_batch(folder)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        return Check(name, False, f"{REPORT_FILE} or {BATCH_FILE} cannot be read ({type(error).__name__})")

    def compute_loss(inputs: Mapping[str, Any]) -> Tensor:
        moved = {name: value.to(device) for name, value in inputs.items()}
        return model(**moved, return_logits=False, use_cache=False).loss

    model.train()
    found = find_first(model, [batch], compute_loss, nullcontext)
    if found is None:
        return Check(name, True, f"computed again ({where}), all of it is finite here")
    return Check(name, False, f"the first value that is not finite is in {found.describe()} ({where})")


def _describe_step(folder: Path) -> str:
    report = read_small_json(folder / REPORT_FILE)
    rows = ", ".join(str(row) for row in report["rows"] if row is not None)
    return f"step {report['step']}" + (f", rows {rows} of the training data" if rows else "")
