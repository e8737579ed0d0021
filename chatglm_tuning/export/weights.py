"""The weights of a base one at a time, in fp32, whatever they are stored in, and a model that reads them as it runs."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chatglm_tuning.base_folder import read_config
from chatglm_tuning.config.arguments import LORA_TARGETS
from chatglm_tuning.loading import Base, load_base
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm_tuning.model.frozen_linear import FrozenLinear
from chatglm_tuning.quantization.packing import dequantize_rows, quantize_rows
from chatglm_tuning.shards import MappedTensor, StoredTensor, find_weight_files, iterate_tensors
from chatglm_tuning.tensor_check import EMBEDDING_KEY, HEAD_KEY


class Weights(Protocol):
    """What gives the tensors of a full-precision ChatGLM-6B by their keys."""

    def read(self, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor in `dtype` that nobody else writes to."""
        ...


def is_linear_weight(key: str) -> bool:
    """Return whether a key is the weight of one of the four linears of a layer, which alone are ever quantised."""
    *_, module, leaf = key.split(".")
    return leaf == "weight" and module in LORA_TARGETS


class StoredWeights:
    """The weights of a model folder, in full precision or quantised.

    held_bits: 8 or 4 to quantise full-precision linears as `load_base` does, and read what came of it.
    """

    def __init__(self, folder: Path, held_bits: int | None = None) -> None:
        self._config = read_config(folder)
        self._stored_bits = self._config.quantization_bit or None
        self._held_bits = held_bits
        self._tensors: dict[str, StoredTensor] = {
            stored.key: stored for stored in iterate_tensors(find_weight_files(folder))
        }

    def has_own_head(self) -> bool:
        """Return whether a head is stored that differs from the embeddings."""
        if HEAD_KEY not in self._tensors:
            return False
        pairs = zip(self._tensors[HEAD_KEY].blocks(), self._tensors[EMBEDDING_KEY].blocks(), strict=True)
        return not all(torch.equal(block.float(), other.float()) for (_, block), (_, other) in pairs)

    def dtype_of(self, key: str) -> torch.dtype:
        """Return the dtype that a tensor is stored in; of a quantised one, that of the embeddings."""
        dtype = self._tensors[key].tensor.dtype
        return self._tensors[EMBEDDING_KEY].tensor.dtype if dtype == torch.int8 else dtype

    def read(self, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor in `dtype`, rounded once; what was read of its file leaves the memory."""
        stored = self._tensors[key]
        if not is_linear_weight(key):
            return _converted(stored, dtype)
        if self._stored_bits:
            scale = _converted(self._tensors[f"{key}_scale"], torch.float16)
            weight = dequantize_rows(stored.tensor, scale, self._stored_bits, torch.float32)
        elif self._held_bits:
            levels, scale = quantize_rows(stored.tensor, self._held_bits)
            weight = dequantize_rows(levels, scale, self._held_bits, torch.float32)
        else:
            return _converted(stored, dtype)
        if isinstance(stored, MappedTensor):
            stored.release()
        return weight.to(dtype)


def _converted(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    copy = torch.empty(stored.tensor.shape, dtype=dtype)
    for place, block in stored.blocks():
        # Through fp32, which holds both: torch converts between fp16 and bf16 one value at a time.
        copy[place].copy_(block if block.dtype == dtype else block.float())
    return copy


def load_skeleton(folder: Path) -> Base:
    """Load a base without the weights of its linears, which stay without storage; checks the folder as `load_base`."""
    meta, cpu = torch.device("meta"), torch.device("cpu")
    return load_base(str(folder), device_of=lambda key: meta if is_linear_weight(key) else cpu)


def load_streamed(folder: Path, weights: Weights | None = None) -> Base:
    """Load a base in fp32 whose linears read their weights each time they run: no more than one is in memory.

    weights: used in place of the folder's own, all of them; None where the folder is in full precision.
    """
    if weights is None:
        base = load_skeleton(folder)
        attach_weights(base.model, StoredWeights(folder))
        return base
    base = load_skeleton(folder)
    config = plain_config(folder)
    config.tie_word_embeddings = base.config.tie_word_embeddings
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    for key, _ in list(model.named_parameters()):
        if not is_linear_weight(key):
            name, _, leaf = key.rpartition(".")
            setattr(model.get_submodule(name), leaf, nn.Parameter(weights.read(key), requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.get_parameter(EMBEDDING_KEY)
    attach_weights(model, weights)
    return Base(model.requires_grad_(False).eval(), base.tokenizer, base.identity)


def plain_config(folder: Path) -> ChatGLMConfig:
    """Return the configuration of the full-precision model of `folder`, in fp32."""
    config = read_config(folder)
    config.quantization_bit = None
    config.dtype = torch.float32
    return config


def make_hollow_model(folder: Path) -> ChatGLMForConditionalGeneration:
    """Return the full-precision model of `folder` without any weights; LoRA can be put around its linears."""
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(plain_config(folder))
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and is_linear_weight(f"{name}.weight"):
            module.weight = _make_stand_in(module)
    return model


def attach_weights(model: nn.Module, weights: Weights) -> None:
    """Let every linear of a layer read its weight before it runs, and drop it afterwards.

    In between it has a stand-in of its shape, without storage of its own, which adapters can be put around.
    """
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear) and is_linear_weight(f"{name}.weight"):
            _attach(module, f"{name}.weight", weights)


def _attach(module: nn.Linear, key: str, weights: Weights) -> None:
    stand_in = _make_stand_in(module)
    module.weight = stand_in

    def take(linear: Any, _inputs: Any) -> None:
        linear.weight = nn.Parameter(weights.read(key), requires_grad=False)

    def drop(linear: Any, _inputs: Any, _output: Any) -> None:
        linear.weight = stand_in

    module.register_forward_pre_hook(take)
    module.register_forward_hook(drop)


def _make_stand_in(module: nn.Linear) -> nn.Parameter:
    """Return a weight of the linear's shape that is one number in memory."""
    return nn.Parameter(torch.zeros(1).expand(module.out_features, module.in_features), requires_grad=False)
