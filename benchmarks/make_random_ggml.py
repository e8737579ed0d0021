"""Write a ChatGLM-6B of random q4_0 weights as chatglm.cpp 0.4 reads it, for `decode.py --rival_model`.

    python benchmarks/make_random_ggml.py --model DIR --output FILE

`--model` is a folder with config.json and ice_text.model, whose sizes are taken.
"""

import argparse
from pathlib import Path
from typing import BinaryIO

import numpy
import torch
from rich.progress import track

from chatglm_tuning.export.ggml import begin_tensor, tensor_names, write_header
from chatglm_tuning.export.weights import plain_config
from chatglm_tuning.model import ChatGLMForConditionalGeneration

# A q4_0 block is an fp16 scale and 32 levels of 4 bits, stored without their offset of 8.
_BLOCK = 32
_BLOCK_BYTES = 2 + _BLOCK // 2
_SCALE = 0.02 / 4


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def write_tensor(file: BinaryIO, name: str, shape: tuple[int, ...], random: numpy.random.Generator) -> None:
    """Write one tensor: matrices as random q4_0 blocks, LayerNorm weights near 1, other vectors near 0, in fp32."""
    is_matrix = len(shape) == 2
    begin_tensor(file, name, shape, "q4_0" if is_matrix else "f32")
    if not is_matrix:
        offset = 1.0 if name.endswith("layernorm.weight") else 0.0
        file.write((random.standard_normal(shape, dtype=numpy.float32) * 0.02 + offset).tobytes())
        return
    for _ in range(shape[0]):
        blocks = random.integers(0, 256, (shape[1] // _BLOCK, _BLOCK_BYTES), dtype=numpy.uint8)
        blocks[:, :2] = numpy.frombuffer(numpy.float16(_SCALE).tobytes(), dtype=numpy.uint8)
        file.write(blocks.tobytes())


def main() -> None:
    arguments = parse_arguments()
    config = plain_config(arguments.model)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in ChatGLMForConditionalGeneration(config).named_parameters()}
    random = numpy.random.default_rng(0)
    with arguments.output.open("wb") as file:
        write_header(file, config, (arguments.model / "ice_text.model").read_bytes(), "q4_0")
        for name in track(tensor_names(config.num_layers), description="writing tensors"):
            write_tensor(file, name, shapes[name], random)


if __name__ == "__main__":
    main()
