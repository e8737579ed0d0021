"""The prefix of P-Tuning v2 as an adapter: its shape, its tensors, and where it lives in a model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMConfig, PrefixEncoder

PREFIX_KEY = "transformer.prefix_encoder."


@dataclass(frozen=True)
class PrefixShape:
    """How many virtual tokens a prefix has, and whether an MLP makes them."""

    pre_seq_len: int
    prefix_projection: bool = False


def prefix_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the prefix tensors of a state dict, named as in the encoder; full-model keys beside them are left out."""
    return {key.removeprefix(PREFIX_KEY): value for key, value in state.items() if key.startswith(PREFIX_KEY)}


def shape_of_prefix(tensors: Mapping[str, Tensor], where: str) -> PrefixShape:
    """Read the shape of a prefix from its tensors, which are named as in the encoder.

    Raises UserError where there is no prefix among them.
    """
    embedding = tensors.get("embedding.weight")
    if embedding is None:
        raise UserError(
            f"there is no prefix in it (no tensor {PREFIX_KEY}embedding.weight)",
            where=where,
            remedy="give the folder of a P-Tuning v2 run",
        )
    return PrefixShape(embedding.shape[0], any(key.startswith("trans.") for key in tensors))


def add_prefix_encoder(model: nn.Module, shape: PrefixShape, tensors: Mapping[str, Tensor] | None, where: str) -> None:
    """Give `model` (a ChatGLMForConditionalGeneration) a prefix encoder in fp32, on its embeddings' device.

    tensors: its values, or None for torch's own initial ones. Raises UserError where they do not fit the model.
    """
    config: ChatGLMConfig = model.config
    config.pre_seq_len, config.prefix_projection = shape.pre_seq_len, shape.prefix_projection
    device = model.transformer.word_embeddings.weight.device
    with torch.device(device):
        encoder = PrefixEncoder(config).to(torch.float32)
    if tensors is not None:
        expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
        found = {key: tuple(value.shape) for key, value in tensors.items()}
        if found != expected:
            raise UserError(
                f"the prefix was trained for another base model: its tensors are {found}, this model's are {expected}",
                where=where,
                remedy="give the base model that it was trained on",
            )
        encoder.load_state_dict(dict(tensors))
    model.transformer.prefix_encoder = encoder


def prefix_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the prefix of `model` under its full names, on the CPU."""
    encoder = model.transformer.prefix_encoder
    return {f"{PREFIX_KEY}{key}": value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
