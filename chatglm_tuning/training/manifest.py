"""What a result says of itself: its data, its settings, and how far its run came (`settings` of the manifest)."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerState, TrainingArguments

from chatglm_tuning.checkpoint import Manifest, file_digest
from chatglm_tuning.config.arguments import TrainRun
from chatglm_tuning.loading import Base

logger = logging.getLogger(__name__)

_THAT_A_RUN_KEEPS = (
    "seed",
    "max_input_length",
    "max_output_length",
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "loss_average",
)
_OF_TRAINER = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
)


def describe(
    run: TrainRun, arguments: TrainingArguments, base: Base, model: nn.Module, dtype: torch.dtype, train_rows: int
) -> Manifest:
    """Return what the adapter's folder will say of itself, but how far the run came.

    dtype: what is computed in. train_rows: rows of an epoch.
    """
    budget = run.options.max_tokens_per_batch
    settings: dict[str, Any] = {
        "seed": run.trainer.seed,
        "max_input_length": run.data.max_input_length,
        "max_output_length": run.data.max_output_length,
        "max_tokens_per_batch": budget,
        "data_path": [path.name for path in run.data.data_path],
        "data_files": _describe_files(run.data.data_path),
        "eval_files": _describe_files(run.data.eval_path),
        "train_rows": train_rows,
        "dtype": str(dtype).removeprefix("torch."),
        **{name: _plain(getattr(arguments, name)) for name in _OF_TRAINER},
        "per_device_train_batch_size": None if budget else arguments.per_device_train_batch_size,
        "processes": arguments.world_size,
        "loss_average": run.options.loss_average,
        "label_smoothing_factor": run.trainer.values.get("label_smoothing_factor", 0.0),
    }
    if isinstance(arguments.deepspeed, str):
        settings["deepspeed"] = Path(arguments.deepspeed).name
    if isinstance(model, PeftModel):
        settings |= _describe_lora(run, model)
    config = base.model.config
    return Manifest(
        method=run.method,
        base_model=base.identity,
        pre_seq_len=config.pre_seq_len,
        prefix_projection=config.prefix_projection,
        settings=settings,
    )


def warn_of_other_settings(before: Manifest, now: Manifest) -> None:
    """Say in what a run that goes on from a checkpoint differs from the one that wrote it."""
    pairs = {name: (before.settings.get(name), now.settings.get(name)) for name in _THAT_A_RUN_KEEPS}
    pairs["the data"] = (_digests_of(before), _digests_of(now))
    pairs["the bits of the base"] = (before.base_model.quantization_bit, now.base_model.quantization_bit)
    pairs["the base's fingerprint"] = (before.base_model.fingerprint[:16], now.base_model.fingerprint[:16])
    for name, (then, here) in pairs.items():
        if then != here:
            logger.warning("%s: %s when the checkpoint was made, and %s now", name, then, here)


def _digests_of(manifest: Manifest) -> list[str]:
    return [f"{file['name']} {file['sha256'][:8]}" for file in manifest.settings.get("data_files", [])]


def with_progress(
    manifest: Manifest, state: TrainerState, arguments: TrainingArguments, *, result_step: int
) -> Manifest:
    """Return `manifest` with the steps that were done, the step whose values are written, and the best evaluation."""
    best = None
    if state.best_global_step is not None and state.best_metric is not None:
        metric = (arguments.metric_for_best_model or "").removeprefix("eval_")
        best = {"step": state.best_global_step, "metric": metric, "value": state.best_metric}
    progress = {
        "steps": state.global_step,
        "epochs": None if state.epoch is None else round(float(state.epoch), 4),
        "result_step": result_step,
        "best": best,
    }
    return replace(manifest, settings={**manifest.settings, **progress})


def _describe_files(paths: Sequence[Path]) -> list[dict[str, Any]]:
    return [{"name": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)} for path in paths]


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _describe_lora(run: TrainRun, model: PeftModel) -> dict[str, Any]:
    """Return the settings of the LoRA adapter in `model`; a loaded one keeps its own, and flags yield to them."""
    config: Any = model.peft_config[str(model.active_adapter)]
    found = {
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "lora_target": sorted(config.target_modules),
    }
    assert run.lora is not None
    asked = {**asdict(run.lora), "lora_target": sorted(run.lora.lora_target)}
    for name, value in found.items():
        if value != asked[name]:
            logger.warning("%s %s is not used: the adapter that is continued has %s", name, asked[name], value)
    return found
