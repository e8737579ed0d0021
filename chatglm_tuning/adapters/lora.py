"""LoRA by peft, on plain and on quantised linears."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from chatglm_tuning.errors import UserError
from chatglm_tuning.quantization.linear import QuantizedLinear


class QuantizedLoraLinear(LoraLinear):
    """peft's LoRA linear around a `QuantizedLinear`, whose packed weight cannot take a merged product."""

    def merge(self, *_args: Any, **_kwargs: Any) -> None:
        """Refuse: the sum would have to be quantised anew."""
        raise UserError(
            "a LoRA adapter cannot be merged into int8 or int4 weights in place",
            remedy="merge it into the full-precision model",
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
    _teach_quantized_linear(config)
    return config


def add_lora(model: nn.Module, config: LoraConfig) -> PeftModel:
    """Freeze `model` and put trainable adapters in fp32 into it."""
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def load_lora(model: nn.Module, folder: Path, *, is_trainable: bool) -> PeftModel:
    """Put the adapter of `folder`, as peft 0.3 and later wrote it, into `model`.

    Raises UserError where the folder holds none or one that does not fit the model.
    """
    try:
        config = LoraConfig.from_pretrained(str(folder))
        _teach_quantized_linear(config)
        config.inference_mode = not is_trainable
        return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=is_trainable)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UserError(
            f"the LoRA adapter could not be loaded into this model ({str(error).splitlines()[0]})",
            where=str(folder),
            remedy="give a folder with adapter_config.json and adapter_model.safetensors or .bin, trained on this base",
        ) from error


def lora_state_dict(model: PeftModel) -> dict[str, Tensor]:
    """Return the adapter's tensors as peft saves them, on the CPU."""
    return {key: value.detach().cpu().contiguous() for key, value in get_peft_model_state_dict(model).items()}


def _teach_quantized_linear(config: LoraConfig) -> None:
    config._register_custom_module({QuantizedLinear: QuantizedLoraLinear})
