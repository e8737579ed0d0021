"""Write a ChatGLM-6B with random weights in the released sharded layout, one shard in memory at a time.

    python benchmarks/make_random_model.py --tokenizer DIR --output DIR [--layers 28 --hidden 4096 …]

`--tokenizer` is a folder with ice_text.model, tokenizer_config.json and config.json, whose special ids and vocabulary
are taken. The weights are N(0, 0.02²), enough for timing, memory and loading, not for answers.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.progress import track

_STD = 0.02
_CHUNK_VALUES = 1 << 24
Shapes = dict[str, tuple[int, ...]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--inner", type=int, default=16384)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def shard_shapes(arguments: argparse.Namespace, vocabulary: int) -> list[Shapes]:
    """Return the tensors of every shard: embeddings first, layers in equal shares, final LayerNorm and head last."""
    shards: list[Shapes] = [{} for _ in range(arguments.shards)]
    shards[0]["transformer.word_embeddings.weight"] = (vocabulary, arguments.hidden)
    for layer in range(arguments.layers):
        shard = shards[layer * arguments.shards // arguments.layers]
        for name, shape in layer_shapes(arguments.hidden, arguments.inner, arguments.heads):
            shard[f"transformer.layers.{layer}.{name}"] = shape
    shards[-1]["transformer.final_layernorm.weight"] = (arguments.hidden,)
    shards[-1]["transformer.final_layernorm.bias"] = (arguments.hidden,)
    shards[-1]["lm_head.weight"] = (vocabulary, arguments.hidden)
    return shards


def layer_shapes(hidden: int, inner: int, heads: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", (hidden,)
        yield f"{name}.bias", (hidden,)
    yield "attention.rotary_emb.inv_freq", (hidden // heads // 4,)
    for name, out, columns in (
        ("attention.query_key_value", 3 * hidden, hidden),
        ("attention.dense", hidden, hidden),
        ("mlp.dense_h_to_4h", inner, hidden),
        ("mlp.dense_4h_to_h", hidden, inner),
    ):
        yield f"{name}.weight", (out, columns)
        yield f"{name}.bias", (out,)


def random_tensor(key: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return the tensor of `key`; the head gets the embeddings' seed, so that both are equal as in the release."""
    name = "transformer.word_embeddings.weight" if key == "lm_head.weight" else key
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sum(name.encode()) * 7919 + len(name))
    tensor = torch.empty(shape, dtype=dtype)
    for part in tensor.view(-1).split(_CHUNK_VALUES):
        part.copy_(torch.randn(part.shape, generator=generator).mul_(_STD))
    return tensor.add_(1.0) if key.endswith("layernorm.weight") else tensor


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    config = json.loads((arguments.tokenizer / "config.json").read_text(encoding="utf-8"))
    config |= {
        "num_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "num_attention_heads": arguments.heads,
        "inner_hidden_size": arguments.inner,
        "torch_dtype": arguments.dtype,
    }
    (arguments.output / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copy(arguments.tokenizer / name, arguments.output)
    dtype = getattr(torch, arguments.dtype)
    shards = shard_shapes(arguments, config["vocab_size"])
    weight_map, total = {}, 0
    for number, shapes in enumerate(track(shards, description="writing shards"), start=1):
        name = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save(
            {key: random_tensor(key, shape, dtype, arguments.seed) for key, shape in shapes.items()},
            arguments.output / name,
        )
        weight_map |= dict.fromkeys(shapes, name)
        total += sum(math.prod(shape) * dtype.itemsize for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (arguments.output / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
