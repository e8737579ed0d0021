"""Training and decoding on one device, a GPU where there is one: speed, memory, and shares of the machine's rates.

    python benchmarks/gpu.py --model DIR --data FILE [--samples 16] [--device auto|cpu]

Memory is that of allocated tensors (`max_memory_allocated`); on a CPU, where this is only a dry run, what a step holds
beyond the model is shown beside it as 0. The table comes last. benchmarks/gpu.sh runs this after the parity tests.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measures import GIB, markdown_table, median_seconds, product_rate, read_rate, synchronize, useful_flop
from torch import Tensor, nn

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.data.collate import PrefixLMCollator
from chatglm_tuning.data.encode import IGNORED_LABEL, EncodingSettings, encode_examples
from chatglm_tuning.data.records import read_records
from chatglm_tuning.estimate import PLANS
from chatglm_tuning.loading import Base, compute_dtype, default_device, load_base
from chatglm_tuning.training.memory import apply_plan

_PROMPT_TOKENS = 64


@dataclass(frozen=True)
class Work:
    """One row of training. batch: samples, None = as many as --samples says. is_lean: memory goes before time."""

    name: str
    method: str
    bits: int | None
    batch: int | None = None
    is_lean: bool = False


WORKS = (
    Work("LoRA", "lora", None),
    Work("LoRA int4", "lora", 4),
    Work("P-Tuning v2 int4", "ptuning", 4),
    Work("P-Tuning v2 int4, the original's headline, lean", "ptuning", 4, batch=4, is_lean=True),
    Work("LoRA, the original's headline, lean", "lora", None, batch=3, is_lean=True),
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pre_seq_len", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    return parser.parse_args(argv)


def load(arguments: argparse.Namespace, bits: int | None, device: torch.device) -> Base:
    """Load the base in what is fastest on `device`."""
    dtype = compute_dtype("auto", device)
    return load_base(str(arguments.model), quantization_bit=bits, dtype=dtype, device_of=lambda _key: device)


def add_adapter(base: Base, work: Work, pre_seq_len: int) -> nn.Module:
    """Return the model to train."""
    apply_plan(PLANS[-1] if work.is_lean else PLANS[0], base.model)
    if work.method == "lora":
        return add_lora(base.model, make_lora_config(rank=8, alpha=32, dropout=0.05, targets=["query_key_value"]))
    add_prefix_encoder(base.model, PrefixShape(pre_seq_len), None, "")
    base.model.get_submodule("transformer.prefix_encoder").requires_grad_(True)
    return base.model


def make_batches(base: Base, data: Path, batch: int, count: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Return the first `count` batches of the data."""
    limit = base.config.max_sequence_length // 2
    examples = read_records([data]).examples[: batch * count]
    encoded = encode_examples(examples, base.tokenizer, EncodingSettings(limit, limit))
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]
    collate = PrefixLMCollator(base.tokenizer.pad_token_id)
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return [{name: value.to(device) for name, value in collate(part).items()} for part in parts]


def measure_training(work: Work, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the figures of one row: steps with AdamW, the first of which is only to warm up."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    base = load(arguments, work.bits, device)
    model = add_adapter(base, work, arguments.pre_seq_len).train()
    samples = work.batch or arguments.samples
    batches = make_batches(base, arguments.data, samples, arguments.steps + 1, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rate = product_rate(device, compute_dtype("auto", device))
    utilisation, seconds, losses = [], [], []
    for batch in batches:
        synchronize(device)
        start = time.perf_counter()
        loss = model(**batch, return_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        tokens = int(batch["attention_mask"].sum())
        labels = int((batch["labels"] != IGNORED_LABEL).sum())
        utilisation.append(useful_flop(base.config, tokens, labels) / seconds[-1] / rate)
    assert all(torch.tensor(losses).isfinite()), losses
    return {
        "work": work.name,
        "samples": samples,
        "utilisation": statistics.median(utilisation[1:]),
        "seconds": statistics.median(seconds[1:]),
        "first_step_seconds": seconds[0],
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "rate": rate,
    }


@torch.no_grad()
def measure_decoding(bits: int | None, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the time of a greedily decoded token after a prompt, and its share of what reading the weights takes."""
    base = load(arguments, bits, device)
    ids = torch.randint(5, 1000, (1, _PROMPT_TOKENS), device=device)
    ids[0, -2], ids[0, -1] = base.config.gmask_token_id, base.config.bos_token_id
    kwargs: dict[str, Any] = {"do_sample": False, "pad_token_id": base.config.pad_token_id}

    def generate(tokens: int) -> float:
        model: Any = base.model
        return median_seconds(
            lambda: model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **kwargs), device, repeats=3
        )

    prompt, whole = generate(1), generate(1 + arguments.new_tokens)
    per_token = (whole - prompt) / arguments.new_tokens
    read_bytes = sum(parameter.nbytes for parameter in base.model.parameters())
    return {
        "work": f"decoding, {f'int{bits}' if bits else 'full'} base",
        "prompt_seconds": prompt,
        "token_seconds": per_token,
        "bandwidth_share": read_bytes / per_token / read_rate(device),
    }


def report(training: list[dict[str, Any]], decoding: list[dict[str, Any]], device: torch.device) -> str:
    """Return the short tables."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (dry run)"
    steps = [
        [
            row["work"],
            str(row["samples"]),
            f"{row['utilisation']:.2f}",
            f"{row['seconds']:.3f}",
            f"{row['peak_bytes'] / GIB:.2f}",
        ]
        for row in training
    ]
    tokens = [
        [row["work"], f"{row['prompt_seconds']:.3f}", f"{row['token_seconds']:.4f}", f"{row['bandwidth_share']:.2f}"]
        for row in decoding
    ]
    rates = f"bf16 product {training[0]['rate'] / 1e12:.1f} TFLOP/s" if training else ""
    return "\n\n".join(
        [
            f"{name}, torch {torch.__version__}; {rates}",
            markdown_table(["training", "samples", "utilisation", "s a step", "peak, GiB"], steps),
            markdown_table(["decoding", "prompt, s", "s a token", "share of the bandwidth"], tokens),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    torch.manual_seed(0)
    device = default_device() if arguments.device == "auto" else torch.device("cpu")
    training, decoding = [], []
    for work in WORKS:
        training.append(measure_training(work, arguments, device))
        print(json.dumps(training[-1]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    for bits in (None, 4):
        decoding.append(measure_decoding(bits, arguments, device))
        print(json.dumps(decoding[-1]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"training": training, "decoding": decoding}, indent=1), encoding="utf-8")
    print(report(training, decoding, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
