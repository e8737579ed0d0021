"""Write a ChatGLM-6B of random q4_0 weights as chatglm.cpp 0.4 reads it, for `decode.py --rival_model`.

    python benchmarks/make_random_ggml.py --model DIR --output FILE

`--model` is a folder with config.json and ice_text.model, whose sizes are taken.
"""

import argparse
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy
from make_random_model import layer_shapes
from rich.progress import track

# ggml: a q4_0 block is an fp16 scale and 32 levels of 4 bits, stored without their offset of 8.
_F32, _Q4_0 = 0, 2
_BLOCK = 32
_BLOCK_BYTES = 2 + _BLOCK // 2
_ALIGNMENT = 16
_CHATGLM_6B, _CONFIG_VERSION = 1, 2
_SCALE = 0.02 / 4
_ROPE_THETA = 10000.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def write_header(file: BinaryIO, config: dict[str, Any], tokenizer: bytes) -> None:
    """Write the magic number, the kind of model, its sizes and its sentencepiece model."""
    file.write(b"ggml" + struct.pack("<i", _CHATGLM_6B))
    sizes = (
        config["vocab_size"],
        config["hidden_size"],
        config["num_attention_heads"],
        config["num_attention_heads"],  # of keys and values
        config["num_layers"],
        config["inner_hidden_size"],
        config["layernorm_epsilon"],
        0,  # no prefix
        _ROPE_THETA,
        config["max_sequence_length"],
        config["eos_token_id"],
        config["pad_token_id"],
    )
    file.write(struct.pack("<2i6ififiii", _CONFIG_VERSION, _Q4_0, *sizes))
    file.write(struct.pack("<i", len(tokenizer)) + tokenizer)


def write_tensor(file: BinaryIO, name: str, shape: tuple[int, ...], random: numpy.random.Generator) -> None:
    """Write one tensor: matrices as random q4_0 blocks, LayerNorm weights near 1, other vectors near 0, in fp32."""
    kind = _Q4_0 if len(shape) == 2 else _F32
    encoded = name.encode()
    file.write(struct.pack("<i", len(encoded)) + encoded)
    file.write(struct.pack(f"<{2 + len(shape)}i", len(shape), *shape, kind))
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    if kind == _F32:
        offset = 1.0 if name.endswith("layernorm.weight") else 0.0
        file.write((random.standard_normal(shape, dtype=numpy.float32) * 0.02 + offset).tobytes())
        return
    for _ in range(shape[0]):
        blocks = random.integers(0, 256, (shape[1] // _BLOCK, _BLOCK_BYTES), dtype=numpy.uint8)
        blocks[:, :2] = numpy.frombuffer(numpy.float16(_SCALE).tobytes(), dtype=numpy.uint8)
        file.write(blocks.tobytes())


def main() -> None:
    arguments = parse_arguments()
    config = json.loads((arguments.model / "config.json").read_text(encoding="utf-8"))
    hidden = config["hidden_size"]
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("transformer.word_embeddings.weight", (config["vocab_size"], hidden)),
    ]
    for layer in range(config["num_layers"]):
        parts = dict(layer_shapes(hidden, config["inner_hidden_size"], config["num_attention_heads"]))
        del parts["attention.rotary_emb.inv_freq"]
        # This reader wants a layer's tensors in the order of its modules.
        order = ("input_layernorm", "attention.query_key_value", "attention.dense", "post_attention_layernorm", "mlp.")
        names = sorted(parts, key=lambda name: next(index for index, part in enumerate(order) if name.startswith(part)))
        shapes += [(f"transformer.layers.{layer}.{name}", parts[name]) for name in names]
    shapes += [(f"transformer.final_layernorm.{leaf}", (hidden,)) for leaf in ("weight", "bias")]
    random = numpy.random.default_rng(0)
    with arguments.output.open("wb") as file:
        write_header(file, config, (arguments.model / "ice_text.model").read_bytes())
        for name, shape in track(shapes, description="writing tensors"):
            write_tensor(file, name, shape, random)


if __name__ == "__main__":
    main()
