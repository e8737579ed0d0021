"""The file that chatglm.cpp 0.4 reads: written tensor by tensor, and read back.

Layout: "ggml", the kind of model, its sizes, its sentencepiece model, then every tensor with its name, shape and kind,
each beginning at a multiple of 16 bytes. Matrices may be quantised in blocks of 32 columns; vectors are fp32.
Source: li-plus/chatglm.cpp, chatglm_cpp/convert.py of release 0.4.2, whose bytes these are.
"""

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from chatglm_tuning.errors import UserError
from chatglm_tuning.export.weights import Weights
from chatglm_tuning.model import ChatGLMConfig

GGML_KINDS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
_BLOCK = 32
_BYTES_OF_A_BLOCK = {"f32": 4 * _BLOCK, "f16": 2 * _BLOCK, "q4_0": 2 + _BLOCK // 2, "q8_0": 2 + _BLOCK}
_ALIGNMENT = 16
_CHATGLM_6B, _CONFIG_VERSION = 1, 2
_SIZES = "<2i6ififiii"
_ROPE_THETA = 10000.0
_VALUES_AT_ONCE = 1 << 24
_RESIDUAL_SCALE = math.sqrt(2 * 28)


def check_ggml(config: ChatGLMConfig, where: Path, *, has_own_head: bool) -> None:
    """Raise UserError for a model that chatglm.cpp's reader of ChatGLM-6B cannot hold."""
    reasons = {
        "its head is not tied to the embeddings": has_own_head,
        f"inner_hidden_size {config.inner_hidden_size} is not 4 times hidden_size {config.hidden_size}": (
            config.inner_hidden_size != 4 * config.hidden_size
        ),
        f"hidden_size {config.hidden_size} cannot be divided by {_BLOCK}": config.hidden_size % _BLOCK != 0,
        f"residual_scale {config.residual_scale} is not the released one": not math.isclose(
            config.residual_scale, _RESIDUAL_SCALE
        ),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise UserError(
                f"chatglm.cpp cannot read this model: {reason}",
                code="E109",
                where=str(where),
                remedy="Export it with --format folder",
            )


def tensor_names(num_layers: int) -> list[str]:
    """Return the names of all tensors in the order that the reader wants: that of the modules."""
    parts = (
        "input_layernorm",
        "attention.query_key_value",
        "attention.dense",
        "post_attention_layernorm",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    )
    leaves = ("weight", "bias")
    layers = [f"transformer.layers.{n}.{part}.{leaf}" for n in range(num_layers) for part in parts for leaf in leaves]
    last = [f"transformer.final_layernorm.{leaf}" for leaf in leaves]
    return ["transformer.word_embeddings.weight", *layers, *last]


def ggml_size_bytes(config: ChatGLMConfig, kind: str) -> int:
    """Return about how large the file of a model is."""
    hidden, inner = config.hidden_size, config.inner_hidden_size
    values = config.vocab_size * hidden + config.num_layers * hidden * (4 * hidden + 2 * inner)
    vectors = config.num_layers * (13 * hidden + inner)
    return values // _BLOCK * _BYTES_OF_A_BLOCK[kind] + 4 * vectors


def write_ggml(
    path: Path, config: ChatGLMConfig, tokenizer: bytes, weights: Weights, kind: str, advance: Callable[[int], None]
) -> None:
    """Write a model whose matrices are of `kind`.

    tokenizer: the bytes of ice_text.model. advance: told of every tensor.
    Raises UserError for a weight that is not finite in its kind.
    """
    with path.open("wb") as file:
        write_header(file, config, tokenizer, kind)
        for name in tensor_names(config.num_layers):
            tensor = weights.read(name)
            begin_tensor(file, name, tuple(tensor.shape), kind if tensor.dim() == 2 else "f32")
            rows_at_once = max(1, _VALUES_AT_ONCE // tensor.shape[-1])
            for rows in tensor.split(rows_at_once):
                encoded, sound = _encode(rows, kind if tensor.dim() == 2 else "f32")
                if not sound:
                    raise UserError(
                        f"{name} has numbers that are not finite in {kind}",
                        code="E107",
                        remedy="Look at the adapter, or write another kind with --ggml_type f32",
                    )
                file.write(encoded)
            advance(1)


def write_header(file: BinaryIO, config: ChatGLMConfig, tokenizer: bytes, kind: str) -> None:
    """Write what stands before the tensors."""
    file.write(b"ggml" + struct.pack("<i", _CHATGLM_6B))
    sizes = (
        config.vocab_size,
        config.hidden_size,
        config.num_attention_heads,
        config.num_attention_heads,  # of keys and values
        config.num_layers,
        config.inner_hidden_size,
        config.layernorm_epsilon,
        0,  # virtual tokens: the reader of ChatGLM-6B has no place for them
        _ROPE_THETA,
        config.max_sequence_length,
        config.eos_token_id,
        config.pad_token_id,
    )
    file.write(struct.pack(_SIZES, _CONFIG_VERSION, GGML_KINDS[kind], *sizes))
    file.write(struct.pack("<i", len(tokenizer)) + tokenizer)


def begin_tensor(file: BinaryIO, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Write what stands before the numbers of one tensor."""
    encoded = name.encode()
    file.write(struct.pack("<i", len(encoded)) + encoded)
    file.write(struct.pack(f"<{2 + len(shape)}i", len(shape), *shape, GGML_KINDS[kind]))
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))


def _encode(rows: Tensor, kind: str) -> tuple[bytes, bool]:
    """Return fp32 `(rows, columns)` or `(columns,)` as the file has it, and whether every number of it is finite."""
    if kind in ("f32", "f16"):
        rounded = rows.to(torch.float32 if kind == "f32" else torch.float16)
        return rounded.numpy().tobytes(), _is_finite(rounded)
    blocks = rows.reshape(-1, _BLOCK)
    scale, levels = (_q8_0 if kind == "q8_0" else _q4_0)(blocks)
    scale16 = scale.half()
    encoded = torch.cat((scale16.view(torch.int8), levels), dim=-1)
    return encoded.numpy().tobytes(), _is_finite(scale16)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    return scale, _quotient(blocks, scale).round().clamp(-128, 127).char()


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The value of the largest magnitude becomes level 0 of 0 … 15, of which 8 is subtracted again in reading."""
    largest = blocks.gather(1, blocks.abs().argmax(dim=-1, keepdim=True))
    scale = largest / -8
    levels = (_quotient(blocks, scale) + 8).round().clamp(0, 15).char()
    half = _BLOCK // 2
    return scale, levels[:, :half] | (levels[:, half:] << 4)


def _quotient(blocks: Tensor, scale: Tensor) -> Tensor:
    return blocks / scale.masked_fill(scale == 0, torch.inf)


@dataclass(frozen=True)
class _Place:
    offset: int
    shape: tuple[int, ...]
    kind: str

    @property
    def size_bytes(self) -> int:
        values = math.prod(self.shape)
        return 4 * values if len(self.shape) == 1 else values // _BLOCK * _BYTES_OF_A_BLOCK[self.kind]


class GgmlWeights:
    """The tensors of a file of `write_ggml`, read back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._places = dict(_read_places(file, path.stat().st_size))

    def read(self, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor in `dtype`."""
        place = self._places[key]
        with self._path.open("rb") as file:
            file.seek(place.offset)
            raw = file.read(place.size_bytes)
        return _decode(raw, place).to(dtype)


def _read_places(file: BinaryIO, size_bytes: int) -> Iterator[tuple[str, _Place]]:
    names = {number: name for name, number in GGML_KINDS.items()}
    file.seek(8 + struct.calcsize(_SIZES))
    file.seek(_integer(file), 1)
    while file.tell() < size_bytes:
        name = file.read(_integer(file)).decode()
        shape = tuple(_integer(file) for _ in range(_integer(file)))
        kind = names[_integer(file)]
        place = _Place(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT, shape, kind)
        yield name, place
        file.seek(place.offset + place.size_bytes)


def _integer(file: BinaryIO) -> int:
    return struct.unpack("<i", file.read(4))[0]


def _decode(raw: bytes, place: _Place) -> Tensor:
    if place.kind in ("f32", "f16"):
        dtype: Any = np.float32 if place.kind == "f32" else np.float16
        return torch.from_numpy(np.frombuffer(raw, dtype).astype(np.float32)).view(place.shape)
    blocks = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, _BYTES_OF_A_BLOCK[place.kind])
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    levels = blocks[:, 2:]
    if place.kind == "q4_0":
        levels = torch.cat((levels & 15, levels >> 4), dim=-1).float() - 8
    else:
        levels = levels.contiguous().view(torch.int8).float()
    return (levels * scale).view(place.shape)
