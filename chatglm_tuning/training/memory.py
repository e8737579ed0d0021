"""How much a run recomputes: as little as the free memory allows, and what that costs."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from peft import PeftModel
from torch import nn

from chatglm_tuning.allocator import keep_freed_memory, return_freed_memory
from chatglm_tuning.checkpoint import whole_checkpoints
from chatglm_tuning.config.arguments import TrainRun
from chatglm_tuning.config.launch import process_count
from chatglm_tuning.errors import UserError
from chatglm_tuning.estimate import (
    GIB,
    Batch,
    Bits,
    ModelShape,
    Plan,
    Tuning,
    choose_plan,
    extra_time,
)
from chatglm_tuning.kernels import set_compiling
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm_tuning.quantization.workspace import workspace
from chatglm_tuning.training.token_budget import TokenBudgetSampler

logger = logging.getLogger(__name__)

_OF_THE_CPU = "DefaultCPUAllocator: can't allocate memory"
# What other programs, and what no estimate knows of, may come to need while a run goes on.
_LEFT_FREE_SHARE = 0.1
_CGROUP = Path("/sys/fs/cgroup")
# Of both versions of control groups: the files of limit, use and what it is made of, and how the latter names files.
_CGROUP_VERSIONS = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


def plan_memory(
    run: TrainRun, config: ChatGLMConfig, model: nn.Module, lengths: Sequence[int], device: torch.device | None = None
) -> Plan:
    """Choose what to recompute of a loaded model, and say so with its cost.

    lengths: tokens of every training row. device: which the steps run on, None = the one that holds the model.
    """
    device = next(model.parameters()).device if device is None else device
    batch = largest_batch(run, lengths)
    shape = ModelShape.of(config.to_dict(), str(config.name_or_path))
    tuning = _tuning(run, config, model)
    free = free_bytes(device)
    if run.trainer.values.get("fsdp"):
        free += _saved_by_sharing(model, process_count())
    kind = "gpu" if device.type == "cuda" else "cpu"
    asked = run.options.checkpointing
    plan, found = choose_plan(shape, tuning, batch, int(free * (1 - _LEFT_FREE_SHARE)), kind, asked=asked)
    logger.info(
        "activation checkpointing: %s (%s); %s; a step needs about %.1f GiB more, of %.1f free",
        plan.checkpointing,
        "chosen" if asked == "auto" else "as asked",
        f"adds {extra_time(plan):.0%} to the products of a step" if plan.checkpointing != "off" else "costs no time",
        found.step_bytes / GIB,
        free / GIB,
    )
    if found.step_bytes > free:
        logger.warning(
            "this may not fit into memory: lower per_device_train_batch_size or the lengths, or see chatglm-tuning "
            "estimate for settings that do"
        )
    return plan


def _saved_by_sharing(model: nn.Module, processes: int) -> int:
    """Return by how much less a process of several needs than the estimate of one says, which may be below 0.

    Its part of the weights is still to be placed; of gradients and AdamW's moments (fp32) it holds its part alone.
    """
    weights = sum(parameter.nbytes for parameter in model.parameters())
    states = 12 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return states * (processes - 1) // processes - weights // processes


def apply_plan(plan: Plan, model: nn.Module) -> None:
    """Set a loaded model, and this process, up for the steps of `plan`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, ChatGLMForConditionalGeneration)
    base.set_activation_checkpointing(plan.checkpointing)
    workspace.set_size(plan.workspace)
    set_compiling(not plan.is_leanest)  # the compiler takes memory, too
    if next(model.parameters()).device.type == "cpu":
        if plan.is_leanest:
            return_freed_memory()
        else:
            keep_freed_memory()


@contextmanager
def told_memory_errors(output_dir: Path) -> Iterator[None]:
    """Turn the error of an allocation that was refused into a UserError that says how to need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or _OF_THE_CPU in str(error)
        if not is_of_memory:
            raise
        whole = next(whole_checkpoints(output_dir), None)
        raise UserError(
            f"the memory is used up ({str(error).strip().splitlines()[0] if str(error) else 'MemoryError'})",
            code="X107",
            where=str(output_dir),
            remedy="lower --per_device_train_batch_size or the lengths, or pass --activation_checkpointing on or "
            "--quantization_bit 4; `chatglm-tuning estimate` says what each part takes"
            + ("" if whole is None else f". {whole.name} is whole: go on with --resume_from_checkpoint {whole}"),
        ) from error


def largest_batch(run: TrainRun, lengths: Sequence[int]) -> Batch:
    """Return the largest micro-batch that rows of these lengths can make."""
    longest = max(lengths)
    if run.options.max_tokens_per_batch is not None:
        samples, tokens = TokenBudgetSampler(
            lengths, run.options.max_tokens_per_batch, seed=run.trainer.seed
        ).largest_batch
    else:
        samples = min(run.trainer.values.get("per_device_train_batch_size", 8), len(lengths))
        tokens = sum(sorted(lengths, reverse=True)[:samples])
    return Batch(samples, tokens, min(tokens, samples * run.data.max_output_length), longest)


def free_bytes(device: torch.device) -> int:
    """Return what this process may still take: of the GPU, or its share of the RAM, a container's limit included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = min([psutil.virtual_memory().available, *_free_bytes_of_container()])
    return max(free, 0) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_bytes_of_container() -> Iterator[int]:
    """Yield what the control group of this process may still take, where it has a limit that can be read.

    Copies of files, such as the weights that were just read, count as free: they go when memory is asked for.
    """
    for names in _CGROUP_VERSIONS:
        try:
            limit, used, parts = ((_CGROUP / name).read_text(encoding="ascii").strip() for name in names[:3])
            if limit != "max":
                sizes = dict(line.split() for line in parts.splitlines())
                yield int(limit) - int(used) + sum(int(sizes.get(name, 0)) for name in names[3])
        except (OSError, ValueError):
            continue  # another version, or a limit that cannot be read


def _tuning(run: TrainRun, config: ChatGLMConfig, model: nn.Module) -> Tuning:
    dtype_bytes = config.dtype.itemsize if isinstance(config.dtype, torch.dtype) else 4
    settings: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        lora: Any = model.peft_config[str(model.active_adapter)]
        settings = {"lora_rank": lora.r, "lora_target": tuple(sorted(lora.target_modules))}
    elif config.pre_seq_len is not None:
        settings = {"pre_seq_len": config.pre_seq_len, "prefix_projection": config.prefix_projection}
    bits = cast("Bits | None", config.quantization_bit or None)
    return Tuning(run.method, bits, dtype_bytes, **settings)
