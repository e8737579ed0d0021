"""The prefix of P-Tuning v2 as an adapter: its shape, its tensors, and where it lives in a model."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration, PrefixEncoder

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
    if embedding is None or embedding.dim() != 2 or not len(embedding):
        raise UserError(
            f"there is no prefix in it (no table {PREFIX_KEY}embedding.weight)",
            code="C102",
            where=where,
            remedy="Give the folder of a P-Tuning v2 run",
        )
    return PrefixShape(embedding.shape[0], any(key.startswith("trans.") for key in tensors))


def check_prefix_fits(config: ChatGLMConfig, shape: PrefixShape, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError where `tensors`, named as in the encoder, are not those of a prefix of `shape` for `config`."""
    with torch.device("meta"):
        expected = PrefixEncoder(_with_prefix(config, shape)).state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        here, there = ("missing" if key not in state else tuple(state[key].shape) for state in (expected, tensors))
        if here != there:
            raise UserError(
                f"the prefix was trained for another base model: its {key} is {there}, this model's is {here}",
                code="C106",
                where=where,
                remedy="Give the base that it was trained on",
            )


def _with_prefix(config: ChatGLMConfig, shape: PrefixShape) -> ChatGLMConfig:
    described = copy.copy(config)
    described.pre_seq_len, described.prefix_projection = shape.pre_seq_len, shape.prefix_projection
    return described


def make_prefix_encoder(
    model: ChatGLMForConditionalGeneration, shape: PrefixShape, tensors: Mapping[str, Tensor] | None, where: str
) -> PrefixEncoder:
    """Return a prefix encoder for `model` in fp32, on its embeddings' device; the model itself stays as it is.

    tensors: its values, or None for torch's own initial ones. Raises UserError where they do not fit the model.
    """
    config = cast("ChatGLMConfig", model.config)
    if tensors is not None:
        check_prefix_fits(config, shape, tensors, where)
    with model.get_parameter("transformer.word_embeddings.weight").device:
        encoder = PrefixEncoder(_with_prefix(config, shape)).to(torch.float32)
    if tensors is not None:
        encoder.load_state_dict(dict(tensors))
    return encoder


def add_prefix_encoder(
    model: ChatGLMForConditionalGeneration, shape: PrefixShape, tensors: Mapping[str, Tensor] | None, where: str
) -> None:
    """Give `model` the encoder of `make_prefix_encoder`."""
    encoder = make_prefix_encoder(model, shape, tensors, where)
    config = cast("ChatGLMConfig", model.config)
    config.pre_seq_len, config.prefix_projection = shape.pre_seq_len, shape.prefix_projection
    encoder.config = config
    model.transformer.prefix_encoder = encoder


def prefix_state_dict(model: ChatGLMForConditionalGeneration) -> dict[str, Tensor]:
    """Return the prefix of `model`, which has one, under its full names, on the CPU."""
    encoder = model.transformer.prefix_encoder
    assert encoder is not None
    return {f"{PREFIX_KEY}{key}": value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
