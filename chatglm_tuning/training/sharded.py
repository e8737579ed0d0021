"""Weights that are shared out among processes (FSDP2, DeepSpeed ZeRO-3): loaded once, gathered to be saved, set again.

What is saved is what one process alone would save. Everything here is called by all processes at once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from chatglm_tuning.adapters.lora import lora_tensors
from chatglm_tuning.base_folder import load_tokenizer
from chatglm_tuning.config.launch import is_first_rank
from chatglm_tuning.loading import Base
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration


def shard_on_cpu(accelerator: Accelerator, settings: Mapping[str, Any] | None) -> bool:
    """Let CPU processes share out the weights; returns whether they do.

    settings: of FSDP, None where it is not asked for. accelerate 1.15 takes them for accelerators alone, and without a
    word trains DDP on CPUs (accelerate/state.py, AcceleratorState.__init__).
    """
    if settings is None or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    state: AcceleratorState = accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)
    if accelerator.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    return True


def load_once(load: Callable[[], Base], folder: Path, config: ChatGLMConfig, dtype: torch.dtype) -> Base:
    """Return the base with its values in the first process, and in the others without: FSDP hands these out.

    load: reads the base onto the CPU. config: of the base in `folder`, which is not quantised.
    The memory of the others is only reserved, never touched.
    """
    base = load() if is_first_rank() else None
    facts: list[Any] = [None if base is None else (base.identity, base.config.tie_word_embeddings)]
    broadcast_object_list(facts)
    if base is not None:
        return base
    identity, is_tied = facts[0]
    config.quantization_bit, config.dtype, config.tie_word_embeddings = None, dtype, is_tied
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    nn.Module.to(model, dtype).to_empty(device="cpu")
    if is_tied:
        model.lm_head.weight = model.get_parameter("transformer.word_embeddings.weight")
    model.requires_grad_(False)
    model.eval()
    return Base(model, load_tokenizer(folder, config), replace(identity))


def shard_again(model: nn.Module) -> None:
    """Free what FSDP has gathered of `model` and not yet shared out again, as after a forward pass without a backward.

    Until then the model holds other parameters (whole ones, in the dtype of computing) than its optimizer.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what is trained of `model` (LoRA, or all of it) under the names it is saved under, as it is held."""
    if isinstance(model, PeftModel):
        return lora_tensors(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gather(model: nn.Module) -> dict[str, Tensor]:
    """Return what is trained of `model`, whole and on the CPU; in other processes than the first, nothing."""
    state = {}
    for name, tensor in trained_tensors(model).items():
        with _whole(tensor) as whole:
            if is_first_rank():
                state[name] = whole.detach().cpu().clone(memory_format=torch.contiguous_format)
    return state


@contextmanager
def _whole(tensor: Tensor) -> Iterator[Tensor]:
    if isinstance(tensor, DTensor):
        yield tensor.full_tensor()
        return
    with _gathered_by_deepspeed(tensor):
        yield tensor


def _gathered_by_deepspeed(parameter: Tensor) -> Any:
    """Return the context in which a parameter of ZeRO-3 is whole, which others are anyway."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # pyright: ignore[reportMissingImports]

    return GatheredParameters([parameter])


@torch.no_grad()
def set_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set what is trained of a model, whether FSDP has shared it out or not; all processes give the same whole tensors.

    values: named as `gather` names them; what is tied may come twice.
    """
    for name, held in trained_tensors(model).items():
        value = values[name].to(held.device, held.dtype)
        if isinstance(held, DTensor):
            # Each process takes its own part of what it was given: nothing is sent.
            value = distribute_tensor(value, held.device_mesh, held.placements, src_data_rank=None)
        held.copy_(value)
