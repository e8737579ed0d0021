"""Time and memory of optimizer steps on a model folder, against the matrix-product rate measured beside them.

    python benchmarks/train_step.py --model DIR --data FILE --method ptuning --quantization_bit 4 --batch 4

Utilisation = useful FLOPs ÷ time ÷ rate. Useful are the forward and input gradients of real tokens,
2·2·(layers·12·hidden²·tokens + label_tokens·hidden·vocab): no recompute, no padding, no weight gradients.
The rate is that of a bf16 512×4096 by 4096×16384 product. Prints one JSON line.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.allocator import keep_freed_memory
from chatglm_tuning.data.collate import PrefixLMCollator
from chatglm_tuning.data.encode import EncodingSettings, encode_examples
from chatglm_tuning.data.records import read_records
from chatglm_tuning.kernels import set_compiling
from chatglm_tuning.loading import Base, load_base
from chatglm_tuning.quantization.workspace import workspace


def peak_gib() -> float:
    """Peak resident memory of this process in GiB (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return kib / 2**20


def product_rate(seconds: float = 3.0) -> float:
    """FLOP per second of a bf16 512×4096 by 4096×16384 product."""
    left = torch.randn(512, 4096).bfloat16()
    right = torch.randn(16384, 4096).bfloat16()
    for _ in range(2):
        left @ right.T
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        left @ right.T
        count += 1
    return count * 2 * 512 * 4096 * 16384 / (time.perf_counter() - start)


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
    parser.add_argument("--activation_checkpointing", choices=("off", "mlp", "on"), default="off")
    parser.add_argument("--workspace", choices=("chunk", "matrix", "layer"), default="matrix")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--no_keep", action="store_true")
    parser.add_argument("--profile", action="store_true")
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


def main() -> None:
    arguments = parse_arguments()
    start = time.perf_counter()
    base = load_base(
        arguments.model, quantization_bit=arguments.quantization_bit, dtype=getattr(torch, arguments.dtype)
    )
    load_seconds, load_gib = time.perf_counter() - start, peak_gib()
    model = add_adapter(base, arguments)
    model.train()
    if arguments.activation_checkpointing == "on":
        base.model.activation_checkpointing_enable({"use_reentrant": False})
    workspace.set_size(arguments.workspace)
    set_compiling(not arguments.no_compile)
    if not arguments.no_keep:
        keep_freed_memory()
    rows = encode_examples(
        read_records([arguments.data]).examples[: arguments.batch * arguments.steps],
        base.tokenizer,
        EncodingSettings(1024, 1024),
    )
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    collate = PrefixLMCollator(base.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    shape = base.model.config
    results = []
    for step in range(arguments.steps):
        part = rows[step * arguments.batch : (step + 1) * arguments.batch]
        tokens = sum(len(row["input_ids"]) for row in part)
        labels = sum(sum(label != -100 for label in row["labels"]) for row in part)
        rate = product_rate()
        profiler = torch.profiler.profile() if arguments.profile and step == arguments.steps - 1 else nullcontext()
        start = time.perf_counter()
        with profiler:
            loss = model(**collate(part), return_logits=False).loss
            forward = time.perf_counter() - start
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - start
        if arguments.profile and step == arguments.steps - 1:
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=45, max_name_column_width=45))
        useful = 4 * (
            shape.num_layers * 12 * shape.hidden_size**2 * tokens + labels * shape.hidden_size * shape.vocab_size
        )
        results.append(
            {
                "utilisation": round(useful / seconds / rate, 3),
                "seconds": round(seconds, 2),
                "forward": round(forward, 2),
                "peak_gib": round(peak_gib(), 2),
                "gflops": round(rate / 1e9),
                "tokens": tokens,
                "loss": round(loss.item(), 4),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    print(
        json.dumps(
            {
                "method": arguments.method,
                "bits": arguments.quantization_bit,
                "activation_checkpointing": arguments.activation_checkpointing,
                "workspace": arguments.workspace,
                "load_seconds": round(load_seconds, 1),
                "load_gib": round(load_gib, 2),
                "peak_gib": round(peak_gib(), 2),
                "utilisation": [row["utilisation"] for row in results],
            }
        )
    )


if __name__ == "__main__":
    main()
