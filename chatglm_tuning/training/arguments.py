"""From the settings of a run to transformers' TrainingArguments and the dtype of the base."""

import logging
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler

from chatglm_tuning.config.arguments import TrainRun
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import DtypeName, compute_dtype, default_device
from chatglm_tuning.training.engines import fsdp_settings

logger = logging.getLogger(__name__)


def training_device(run: TrainRun) -> torch.device:
    """Return the device of this process: under torchrun the GPU of its local rank, else the first, or the CPU."""
    import os

    if run.trainer.values.get("use_cpu"):
        return torch.device("cpu")
    device = default_device()
    if device.type == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


def base_dtype(run: TrainRun, device: torch.device) -> torch.dtype:
    """Return the dtype of the base: what was asked for, else fp32 for full tuning and the device's own for adapters."""
    name: DtypeName = run.model.dtype
    if name == "auto" and run.method == "full":
        name = "float32"
    elif name == "auto" and run.trainer.values.get("bf16"):
        name = "bfloat16"
    elif name == "auto" and run.trainer.values.get("fp16"):
        name = "float16"
    return compute_dtype(name, device)


def make_training_arguments(run: TrainRun, device: torch.device, dtype: torch.dtype) -> TrainingArguments:
    """Return Trainer's arguments.

    Adapters are kept in fp32 on a base in `dtype`, which needs no autocast. An fp16 base gets loss scaling, without
    which LoRA ended in NaN for users of the original; on a CPU fp16 is never used.
    Raises UserError for a value that transformers refuses.
    """
    values: dict[str, Any] = dict(run.trainer.values)
    for handled_here in ("label_smoothing_factor", "save_total_limit", "bf16", "fp16"):
        values.pop(handled_here, None)
    on_gpu = device.type == "cuda"
    values["fp16"] = on_gpu and (dtype == torch.float16 or bool(run.trainer.values.get("fp16")))
    values["bf16"] = run.method == "full" and bool(run.trainer.values.get("bf16"))
    if values["fp16"] and not run.trainer.values.get("fp16"):
        logger.warning("the base is in float16: the loss is scaled (fp16), since LoRA would end in NaN without it")
    values["use_cpu"] = not on_gpu
    values["remove_unused_columns"] = False  # the collator takes what it needs
    values["logging_nan_inf_filter"] = False  # it would report NaN as loss 0
    values["prediction_loss_only"] = True
    values["activation_checkpointing"] = False  # training/memory.py sees to it
    values.setdefault("report_to", "tensorboard")
    values.setdefault("ddp_find_unused_parameters", False)
    values["output_dir"] = str(run.trainer.output_dir)
    if values.get("fsdp"):
        values["fsdp_config"] = fsdp_settings(values)
    if run.options.early_stopping_patience is not None:
        values.setdefault("metric_for_best_model", "loss")
        values.setdefault("restore_callback_states_from_checkpoint", True)
    if values.get("save_strategy") == "best":
        values.setdefault("metric_for_best_model", "loss")
    try:
        arguments = TrainingArguments(**values)
        for report in get_reporting_integration_callbacks(arguments.report_to):
            report()  # one whose package is missing says so only when it is made, which Trainer does after the load
        _find_optimizer(arguments)
        _make_schedule(arguments)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UserError(
            f"transformers refuses these training arguments ({str(error).splitlines()[0]})",
            code="A114",
            remedy="correct them in the --train_args_file or on the command line",
        ) from error
    if on_gpu and arguments.n_gpu > 1:
        if not run.options.model_parallel:
            logger.warning(
                "%d GPUs are visible and one is used; to use all: torchrun --nproc_per_node=%d SCRIPT ARGUMENTS",
                arguments.n_gpu,
                arguments.n_gpu,
            )
        arguments._n_gpu = 1  # Trainer would wrap the model in DataParallel, which the original crashed in
    return arguments


def _find_optimizer(arguments: TrainingArguments) -> None:
    """Look the optimizer up as Trainer does after the load, which raises where its package is missing."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ValueError as error:
        if "need to pass a" not in str(error):  # a model, which is there by then
            raise


def _make_schedule(arguments: TrainingArguments) -> None:
    """Make the schedule of the learning rate once, for nothing: Trainer, which makes it after the load, raises then."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate)
    settings: Any = arguments.lr_scheduler_kwargs or {}  # a dictionary, once TrainingArguments has read it
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=1,
        num_training_steps=2,
        scheduler_specific_kwargs=dict(settings),
    )
