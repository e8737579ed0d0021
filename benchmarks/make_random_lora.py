"""Write a LoRA of random matrices, both of them other than zero, as peft writes one.

    python benchmarks/make_random_lora.py --model DIR --output DIR [--rank 8] [--targets query_key_value …]

`--model` is a folder with config.json, whose sizes are taken. B is N(0, `--strength`²), A as peft begins it.
"""

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from chatglm_tuning.adapters.lora import make_lora_config
from chatglm_tuning.checkpoint import LORA_FILE
from chatglm_tuning.config.arguments import LORA_TARGETS
from chatglm_tuning.export.weights import make_hollow_model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--targets", nargs="+", choices=LORA_TARGETS, default=list(LORA_TARGETS))
    parser.add_argument("--strength", type=float, default=0.02)
    return parser.parse_args()


def write_lora(arguments: argparse.Namespace) -> None:
    """Write the adapter into its folder."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, module in make_hollow_model(arguments.model).named_modules():
        if name.rpartition(".")[2] in arguments.targets and isinstance(module, torch.nn.Linear):
            first = torch.rand(arguments.rank, module.in_features, generator=generator) * 2 - 1
            second = torch.randn(module.out_features, arguments.rank, generator=generator)
            state[f"base_model.model.{name}.lora_A.weight"] = first / math.sqrt(module.in_features)
            state[f"base_model.model.{name}.lora_B.weight"] = second * arguments.strength
    config = make_lora_config(rank=arguments.rank, alpha=arguments.alpha, dropout=0.0, targets=arguments.targets)
    config.inference_mode = True
    config.save_pretrained(str(arguments.output))
    save_file(state, arguments.output / LORA_FILE, metadata={"format": "pt"})


if __name__ == "__main__":
    write_lora(parse_arguments())
