"""The folder that a run leaves where a number was not finite: its batch, where it was found, and the adapter."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatglm_tuning.training.replay import Finding, MicroBatch

BATCH_FILE = "batch.safetensors"
REPORT_FILE = "stopped.json"
_RNG_STATE, _CUDA_RNG_STATE = "rng_state", "cuda_rng_state"


@dataclass(frozen=True)
class StoppedStep:
    """What was seen. step: counted from 1. process: the rank that has seen it first."""

    step: int
    loss: float
    gradient_norm: float | None
    finding: Finding | None
    process: int


def write_stopped_step(
    folder: Path, stopped: StoppedStep, batch: MicroBatch, row_of: Callable[[Sequence[int]], int | None]
) -> None:
    """Write the report and the micro-batch, with which `read_micro_batch` repeats the step.

    row_of: the number of a row of the training data, given its tokens without padding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in batch.inputs.items() if isinstance(value, Tensor)}
    tensors[_RNG_STATE] = batch.rng_state
    if batch.cuda_rng_state is not None:
        tensors[_CUDA_RNG_STATE] = batch.cuda_rng_state.cpu()
    save_file(tensors, folder / BATCH_FILE)
    rows = [row_of(tokens) for tokens in _rows_of(tensors)]
    report = {**asdict(stopped), "rows": rows}
    # JSON knows no NaN.
    report |= {key: str(value) for key, value in report.items() if isinstance(value, float) and not isfinite(value)}
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read_micro_batch(folder: Path) -> MicroBatch:
    """Return the micro-batch that `write_stopped_step` has written."""
    tensors: dict[str, Any] = load_file(folder / BATCH_FILE)
    return MicroBatch(
        inputs=tensors, rng_state=tensors.pop(_RNG_STATE), cuda_rng_state=tensors.pop(_CUDA_RNG_STATE, None)
    )


def _rows_of(tensors: dict[str, Tensor]) -> list[list[int]]:
    ids, mask = tensors["input_ids"], tensors.get("attention_mask")
    kept = torch.ones_like(ids) if mask is None else mask
    return [row[here.bool()].tolist() for row, here in zip(ids, kept, strict=True)]
