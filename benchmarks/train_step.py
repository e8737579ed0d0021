"""Time and memory of optimizer steps on a model folder, against the matrix-product rate measured beside them.

    python benchmarks/train_step.py --model DIR --data FILE --method ptuning --quantization_bit 4 --batch 4

Utilisation is `measures.useful_flop` ÷ time ÷ `measures.product_rate` of bf16. Prints a JSON line for every step and
one for the run. `--lean` is what training does where memory is scarcest.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from measures import GIB, product_rate, resident_peak_bytes, useful_flop

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.data.collate import PrefixLMCollator
from chatglm_tuning.data.encode import IGNORED_LABEL, EncodingSettings, encode_examples
from chatglm_tuning.data.records import read_records
from chatglm_tuning.estimate import PLANS, Plan
from chatglm_tuning.loading import Base, load_base
from chatglm_tuning.training.memory import apply_plan

Rows = Sequence[dict[str, Any]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", choices=("lora", "ptuning"), required=True)
    parser.add_argument("--quantization_bit", type=int, choices=(4, 8))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pre_seq_len", type=int, default=128)
    parser.add_argument("--lora_rank", type=int, default=8)
    recomputing = parser.add_mutually_exclusive_group()
    recomputing.add_argument("--activation_checkpointing", choices=("off", "mlp", "on"), default="off")
    recomputing.add_argument("--lean", action="store_true", help="recompute all, and unpack weights in chunks")
    parser.add_argument("--workspace", choices=("chunk", "matrix", "layer"), default="matrix")
    parser.add_argument("--profile", action="store_true", help="print where the time of the last step went")
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


def add_adapter(base: Base, arguments: argparse.Namespace) -> torch.nn.Module:
    """Return the model to train: LoRA on query_key_value, or a new prefix."""
    if arguments.method == "lora":
        config = make_lora_config(rank=arguments.lora_rank, alpha=32, dropout=0.05, targets=["query_key_value"])
        return add_lora(base.model, config)
    add_prefix_encoder(base.model, PrefixShape(arguments.pre_seq_len), None, "")
    base.model.get_submodule("transformer.prefix_encoder").requires_grad_(True)
    return base.model


def read_batches(base: Base, arguments: argparse.Namespace) -> list[Rows]:
    """Return the first rows of the data as the batches of all steps."""
    examples = read_records([arguments.data]).examples[: arguments.batch * arguments.steps]
    encoded = encode_examples(examples, base.tokenizer, EncodingSettings(1024, 1024))
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]
    return [rows[start : start + arguments.batch] for start in range(0, len(rows), arguments.batch)]


def measure_step(base: Base, rows: Rows, step: Callable[[dict[str, Any]], tuple[float, float]]) -> dict[str, Any]:
    """Run `step`, which returns its loss and the seconds of its forward pass, and measure the product rate before."""
    tokens = sum(len(row["input_ids"]) for row in rows)
    labels = sum(label != IGNORED_LABEL for row in rows for label in row["labels"])
    rate = product_rate(torch.device("cpu"), torch.bfloat16)
    batch = PrefixLMCollator(base.tokenizer.pad_token_id)(rows)
    start = time.perf_counter()
    loss, forward = step(batch)
    seconds = time.perf_counter() - start
    return {
        "utilisation": float(f"{useful_flop(base.config, tokens, labels) / seconds / rate:.3g}"),
        "seconds": round(seconds, 2),
        "forward": round(forward, 2),
        "peak_gib": round(resident_peak_bytes() / GIB, 2),
        "gflops": round(rate / 1e9),
        "tokens": tokens,
        "loss": round(loss, 4),
    }


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    base = load_base(
        arguments.model, quantization_bit=arguments.quantization_bit, dtype=getattr(torch, arguments.dtype)
    )
    load_seconds, load_gib = time.perf_counter() - start, resident_peak_bytes() / GIB
    model = add_adapter(base, arguments).train()
    plan = PLANS[-1] if arguments.lean else Plan(arguments.activation_checkpointing, arguments.workspace)
    apply_plan(plan, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(batch: dict[str, Any]) -> tuple[float, float]:
        start = time.perf_counter()
        loss = model(**batch, return_logits=False).loss
        forward = time.perf_counter() - start
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), forward

    results = []
    batches = read_batches(base, arguments)
    for number, rows in enumerate(batches, start=1):
        is_profiled = arguments.profile and number == len(batches)
        with torch.profiler.profile() if is_profiled else nullcontext() as profiler:
            results.append(measure_step(base, rows, step))
        if profiler is not None:
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=45, max_name_column_width=45))
        print(json.dumps(results[-1]), flush=True)
    run = {
        "method": arguments.method,
        "bits": arguments.quantization_bit,
        "activation_checkpointing": plan.checkpointing,
        "workspace": plan.workspace,
        "load_seconds": round(load_seconds, 1),
        "load_gib": round(load_gib, 2),
        "peak_gib": round(resident_peak_bytes() / GIB, 2),
        "utilisation": [result["utilisation"] for result in results],
    }
    print(json.dumps(run))


if __name__ == "__main__":
    main()
