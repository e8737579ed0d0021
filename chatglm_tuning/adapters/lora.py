"""LoRA by peft, on plain and on quantised linears."""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils import CONFIG_NAME
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from chatglm_tuning.errors import UserError
from chatglm_tuning.model.frozen_linear import FrozenLinear
from chatglm_tuning.quantization.linear import QuantizedLinear
from chatglm_tuning.small_json import read_small_json

DEFAULT_ADAPTER = "default"
# They import a module by its name, and copy layers.
_REFUSED_SETTINGS = ("megatron_config", "layer_replication")
_MOST_REPETITIONS = 4
_COPY_AGAIN = "Copy the adapter's folder again, with adapter_config.json and its weights"


class LeanLoraLinear(LoraLinear):
    """peft's LoRA linear, whose one adapter adds to the base's product in place, in the dtype of the states.

    What peft does otherwise, in fp32 copies of states and product, is left to peft: an adapter switched off or merged,
    several at a time, DoRA and the like, autocast, and everything without a gradient.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `(…, in)` to `(…, out)`."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        is_plain = not (args or kwargs or self.disable_adapters or self.merged) and name in self.lora_A
        is_cast = torch.is_autocast_enabled(x.device.type)
        if not is_plain or name in self.lora_variant or self.lora_bias[name] or is_cast or not torch.is_grad_enabled():
            return super().forward(x, *args, **kwargs)
        first, second = self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraSum.apply(self.base_layer(x), self.lora_dropout[name](x), first, second, self.scaling[name])


class _LoraSum(torch.autograd.Function):
    """product + scaling · (x · Aᵀ) · Bᵀ, in place; A and B are fp32 and multiplied in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, x: Tensor, first: Tensor, second: Tensor, scaling: float) -> Tensor:
        ctx.mark_dirty(product)
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ first.to(x.dtype).T  # (rows, rank)
        ctx.save_for_backward(x, inner, first, second)
        ctx.scaling = scaling
        product.view(len(rows), -1).addmm_(inner, second.to(x.dtype).T, alpha=scaling)
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, first, second = ctx.saved_tensors
        rows, of_product = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        of_inner = (of_product @ second.to(x.dtype)).mul_(ctx.scaling)
        of_first = (of_inner.T @ rows).to(first.dtype)
        of_second = (of_product.T @ inner).to(second.dtype).mul_(ctx.scaling)
        of_x = (of_inner @ first.to(x.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        return gradient, of_x, of_first, of_second, None


class QuantizedLoraLinear(LeanLoraLinear):
    """LoRA around a `QuantizedLinear`, whose packed weight cannot take a merged product."""

    def merge(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse: the sum would have to be quantised anew."""
        raise UserError(
            "a LoRA adapter cannot be merged into int8 or int4 weights in place",
            code="E106",
            remedy="Merge it into the full-precision model",
        )


def make_lora_config(*, rank: int, alpha: int, dropout: float, targets: Sequence[str]) -> LoraConfig:
    """Return peft's configuration of one LoRA adapter."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    _teach_lean_linears(config)
    return config


def add_lora(
    model: PreTrainedModel | PeftModel, config: LoraConfig, *, adapter_name: str = DEFAULT_ADAPTER
) -> PeftModel:
    """Freeze `model` and put trainable adapters in fp32 into it; a PeftModel gets one more beside those it has."""
    config.base_model_name_or_path = model.config.name_or_path
    with warnings.catch_warnings():
        # It has `in_features` and `out_features`, which is all that peft needs of a layer it does not know.
        warnings.filterwarnings("ignore", message="Unsupported layer type .*QuantizedLinear")
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=adapter_name, autocast_adapter_dtype=True)
        model.add_adapter(adapter_name, config, autocast_adapter_dtype=True)
        return model


def load_lora(
    model: PreTrainedModel | PeftModel,
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    is_trainable: bool,
    adapter_name: str = DEFAULT_ADAPTER,
) -> PeftModel:
    """Put the adapter of `folder`, as peft 0.3 and later wrote it, into `model`, beside those that it has.

    tensors: the adapter's, named as peft saves them.
    Raises UserError where the folder's configuration is none, or the tensors are not all that it and the model ask for.
    """
    config = read_lora_config(folder)
    _check_ranks(config, tensors, str(folder))
    _teach_lean_linears(config)
    config.inference_mode = not is_trainable
    try:
        adapted = add_lora(model, config, adapter_name=adapter_name)
    except ValueError as error:
        raise UserError(
            f"the adapter's targets ({', '.join(sorted(config.target_modules or ()))}) are not in this model",
            code="C106",
            where=str(folder),
            remedy="Give an adapter that was trained on ChatGLM-6B",
        ) from error
    try:
        check_lora_tensors(lora_state_dict(adapted, adapter_name), tensors, str(folder))
    except UserError:
        if isinstance(model, PeftModel):
            model.delete_adapter(adapter_name)
        raise
    set_peft_model_state_dict(adapted, dict(tensors), adapter_name=adapter_name)
    return adapted if is_trainable else adapted.requires_grad_(False).eval()


def read_lora_config(folder: Path) -> LoraConfig:
    """Read peft's configuration in `folder`; raises UserError where it is none, or of another method than LoRA."""
    try:
        settings = read_small_json(folder / CONFIG_NAME)
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            "adapter_config.json is no configuration of peft", code="C104", where=str(folder), remedy=_COPY_AGAIN
        ) from error
    if not isinstance(config, LoraConfig):
        method = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(
            f"this is an adapter of peft's method {method}, and only LoRA can be loaded",
            code="C108",
            where=str(folder),
            remedy="Give the folder of a LoRA run",
        )
    for name in _REFUSED_SETTINGS:
        if settings.get(name):
            raise _refused_setting(folder, f"{name}, which ChatGLM-6B has no use for")
    for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        given = settings.get(name)
        if any(not _is_quickly_matched(pattern) for pattern in ([given] if isinstance(given, str) else given or ())):
            raise _refused_setting(folder, f"a pattern in {name} that could take for ever to compare with a name")
    return config


def _refused_setting(folder: Path, found: str) -> UserError:
    return UserError(
        f"adapter_config.json has {found}",
        code="C104",
        where=str(folder),
        remedy="Give the folder of a LoRA run on ChatGLM-6B",
    )


def _is_quickly_matched(pattern: object) -> bool:
    """Whether `re` cannot need exponential time for it: no repeated group, and few repetitions."""
    if not isinstance(pattern, str):
        return False
    return not re.search(r"\)\s*[*+{]", pattern) and len(re.findall(r"[*+{]", pattern)) <= _MOST_REPETITIONS


def _check_ranks(config: LoraConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError where the configuration asks for larger matrices than are stored: they would be made at first."""
    stored = max((min(value.shape) for value in tensors.values() if value.dim() == 2), default=0)
    asked = [config.r, *(config.rank_pattern or {}).values()]
    if any(not isinstance(rank, int) or rank > stored for rank in asked):
        largest = max(map(str, asked), key=len)
        raise UserError(
            f"the LoRA adapter does not fit its configuration: rank {largest} is asked for, and {stored} is stored",
            code="C104",
            where=where,
            remedy=_COPY_AGAIN,
        )


def check_lora_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError where names or shapes, as peft saves them, differ, which peft would pass over in part."""
    misfits = [f"it has no {key}" for key in expected.keys() - found.keys()]
    misfits += [f"it has {key}, which this model has not" for key in found.keys() - expected.keys()]
    for key in expected.keys() & found.keys():
        here, there = tuple(expected[key].shape), tuple(found[key].shape)
        if here != there:
            misfits.append(f"{key} is {there}, and {here} is needed")
    if misfits:
        raise UserError(
            f"the LoRA adapter does not fit this base model: {min(misfits)}",
            code="C106",
            where=where,
            remedy="Give the base that it was trained on",
        )


def lora_state_dict(model: PeftModel, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, Tensor]:
    """Return the adapter's tensors as peft saves them, on the CPU."""
    return {key: value.detach().cpu().contiguous() for key, value in lora_tensors(model, adapter_name).items()}


def lora_tensors(model: PeftModel, adapter_name: str = DEFAULT_ADAPTER) -> dict[str, Tensor]:
    """Return the adapter's parameters under the names that peft saves them under."""
    # "auto" would ask the hub for the base's config to see whether embeddings were resized; none ever are.
    return get_peft_model_state_dict(
        model, state_dict=dict(model.named_parameters()), adapter_name=adapter_name, save_embedding_layers=False
    )


def _teach_lean_linears(config: LoraConfig) -> None:
    config._register_custom_module({QuantizedLinear: QuantizedLoraLinear, FrozenLinear: LeanLoraLinear})
