"""A LoRA merged into the weights of its base, tensor by tensor, and the folder that they are written into."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from chatglm_tuning.adapters.lora import load_lora, read_lora_config
from chatglm_tuning.base_folder import MERGED_KEY, read_config
from chatglm_tuning.checkpoint import read_lora
from chatglm_tuning.errors import UserError
from chatglm_tuning.export.weights import StoredWeights, is_linear_weight, make_hollow_model
from chatglm_tuning.new_folder import WeightsWriter, copy_tokenizer, write_config
from chatglm_tuning.quantization.packing import quantize_rows
from chatglm_tuning.tensor_check import EMBEDDING_KEY, HEAD_KEY

# Initialisations after which the base's own weights are as they were.
_KEEPS_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", None)


def check_mergeable(checkpoint: Path, held_bits: int | None) -> None:
    """Raise UserError for a LoRA that cannot be merged into the linears of a base held in `held_bits`."""
    config: Any = read_lora_config(checkpoint)
    initial = config.init_lora_weights
    refused = {
        f"it trains biases (bias {config.bias})": config.bias != "none" or getattr(config, "lora_bias", False),
        "it trains whole modules (modules_to_save)": bool(config.modules_to_save),
        "it trains single tokens (trainable_token_indices)": bool(getattr(config, "trainable_token_indices", None)),
        "it trains parameters that are no linears (target_parameters)": bool(
            getattr(config, "target_parameters", None)
        ),
        f"it was begun from changed base weights (init_lora_weights {initial})": initial not in _KEEPS_THE_BASE,
        f"it is a DoRA on an int{held_bits} base": bool(held_bits) and getattr(config, "use_dora", False),
    }
    for what, is_so in refused.items():
        if is_so:
            raise UserError(
                f"this LoRA cannot be merged: {what}",
                code="E106",
                where=str(checkpoint),
                remedy="Give a plain LoRA of the four linears; of one begun from changed weights, save it with peft's "
                "path_initial_model_for_weight_conversion; merge a DoRA onto full precision with --merge_onto full",
            )


class MergedWeights:
    """The weights of `base` with a LoRA merged into them by peft's own arithmetic, in fp32.

    keys: of all tensors, in the order of the model's modules; the head is among them where it is not tied.
    """

    def __init__(self, folder: Path, base: StoredWeights, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        model = make_hollow_model(folder)
        self.has_own_head = base.has_own_head()
        self.keys = [key for key, _ in model.named_parameters() if key != HEAD_KEY]
        self.keys += [HEAD_KEY] if self.has_own_head else []
        adapted = load_lora(model, checkpoint, read_lora(checkpoint), is_trainable=False)
        self._base = base
        self._layers: dict[str, Any] = {}
        for name, module in adapted.named_modules():
            if isinstance(module, LoraLayer):
                key = f"{name.removeprefix('base_model.model.')}.weight"
                if not is_linear_weight(key):
                    raise UserError(
                        f"this LoRA cannot be merged: it is on {key}, and only the four linears of a layer are merged",
                        code="E106",
                        where=str(checkpoint),
                        remedy="Give a LoRA of query_key_value, dense, dense_h_to_4h and dense_4h_to_h",
                    )
                self._layers[key] = module

    def dtype_of(self, key: str) -> torch.dtype:
        """Return the dtype that the base stores this tensor in."""
        return self._base.dtype_of(key)

    def read(self, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return base + scaling · B · A for the weight of an adapted linear, else the base's tensor.

        The sum is of fp32, and rounded once to `dtype`.
        """
        layer = self._layers.get(key)
        if layer is None:
            return self._base.read(key, dtype)
        linear = layer.get_base_layer()
        stand_in = linear.weight
        linear.weight = nn.Parameter(self._base.read(key), requires_grad=False)
        try:
            layer.merge(safe_merge=False)
            return linear.weight.data.to(dtype)
        finally:
            # The weight is gone with its sum in it; the layer can be merged anew.
            layer.merged_adapters.clear()
            linear.weight = stand_in


@dataclass(frozen=True)
class Form:
    """What weights are written in. dtype: None keeps what the base stores; bits: of the four linears, None for none."""

    dtype: torch.dtype | None = None
    bits: int | None = None


def write_merged_folder(
    folder: Path,
    weights: MergedWeights,
    form: Form,
    target: Path,
    advance: Callable[[int], None],
    *,
    merged: Mapping[str, str],
) -> None:
    """Write a model folder in the released layout: the tensors of `weights` in `form`, beside tokenizer and config.

    The head is written only where it is not tied. advance: told of every tensor.
    merged: the adapters that are in the weights now, digest → name, for config.json.
    Raises UserError where a weight is too large for its dtype.
    """
    writer = WeightsWriter(target)
    for key in weights.keys:
        for name, part in _formed(key, weights, form):
            writer.add(name, part)
        advance(1)
    writer.finish()
    copy_tokenizer(folder, target)
    dtype = form.dtype or weights.dtype_of(EMBEDDING_KEY)
    changes: dict[str, Any] = {
        "tie_word_embeddings": not weights.has_own_head,
        "torch_dtype": str(dtype).removeprefix("torch."),
        MERGED_KEY: [{"name": name, "tensors_sha256": digest} for digest, name in merged.items()],
    }
    if form.bits or read_config(folder).quantization_bit:
        changes |= {"quantization_bit": form.bits or 0, "quantization_embeddings": False}
    write_config(folder, target, changes)


def _formed(key: str, weights: MergedWeights, form: Form) -> Iterator[tuple[str, Tensor]]:
    if form.bits and is_linear_weight(key):
        levels, scale = quantize_rows(weights.read(key), form.bits)
        refuse_infinite(key, scale, weights.checkpoint)
        yield key, levels
        yield f"{key}_scale", scale
        return
    tensor = weights.read(key, form.dtype or weights.dtype_of(key))
    refuse_infinite(key, tensor, weights.checkpoint)
    yield key, tensor


def refuse_infinite(key: str, tensor: Tensor, checkpoint: Path) -> None:
    """Raise UserError for a tensor that rounding to its dtype made infinite, or that was not finite before."""
    # NaN is the least and the largest of whatever it is among; another way would need memory of the tensor's size.
    if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise UserError(
            f"merged with it, {key} has numbers that are not finite in {str(tensor.dtype).removeprefix('torch.')}",
            code="E107",
            where=str(checkpoint),
            remedy="Write a type that holds larger numbers with --dtype bfloat16 or --dtype float32; where that does "
            "not help, the base's own weights are damaged",
        )
