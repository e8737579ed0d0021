"""Training steps at full size: utilisation and peak memory of every row of the table in docs/performance.md.

    python benchmarks/full_size.py --model DIR --data FILE [--units amx_bf16 avx512_bf16] [--only WORD …]
    python benchmarks/full_size.py --render

`--model`: a full-size model in the released layout (benchmarks/make_random_model.py writes one). `--data`: rows of
ADGEN. Every row runs alone in a process (benchmarks/train_step.py), so that its peak is its own, loading included. The
rate of a bf16 product is measured beside every step, and utilisation is taken of it; the first step, which compiles
kernels, is told apart. A processor with an AMX unit is measured with it and, oneDNN being kept from it, without: the
rate falls to what processors without one reach, and what is not a product weighs less. Results are merged into
benchmarks/results/full_size.json; the table and the picture are made of all that it holds, by `--render` without
running anything.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measures import describe_machine, machine_sentence, markdown_table, processor_lines, replace_section

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "full_size.json"
DOCUMENT = REPOSITORY / "docs" / "performance.md"
PICTURE = REPOSITORY / "docs" / "full_size.png"
# What multiplies bf16 matrices: the flag of /proc/cpuinfo that a processor has it, and what restricts oneDNN to it.
UNITS = {"amx_bf16": {}, "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "other": {}}
LONGEST_SAMPLE = 2048
_LIMIT = LONGEST_SAMPLE // 2


@dataclass(frozen=True)
class Row:
    """One line of the table. is_long: one sample of the model's whole context, instead of the data's first rows."""

    name: str
    method: str
    bits: int | None
    batch: int
    flags: tuple[str, ...] = ("--activation_checkpointing", "off")
    is_long: bool = False


_LEAN = ("--lean",)
ROWS = (
    Row("P-Tuning v2 int4, batch 4", "ptuning", 4, 4),
    Row("P-Tuning v2 int4, batch 4, leanest", "ptuning", 4, 4, _LEAN),
    Row("LoRA bf16, batch 3", "lora", None, 3),
    Row("LoRA bf16, batch 3, leanest", "lora", None, 3, _LEAN),
    Row("LoRA int4, batch 3", "lora", 4, 3),
    Row("LoRA int4, batch 3, leanest", "lora", 4, 3, _LEAN),
    Row("P-Tuning v2 int8, batch 4", "ptuning", 8, 4),
    Row("LoRA int4, 2,048 tokens", "lora", 4, 1, is_long=True),
    Row("LoRA int4, 2,048 tokens, leanest", "lora", 4, 1, _LEAN, is_long=True),
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--units", nargs="+", choices=tuple(UNITS), default=available_units())
    parser.add_argument("--steps", type=int, default=3, help="how many the figures are taken of")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name has all of these words")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="only write the table and the picture")
    arguments = parser.parse_args(argv)
    if not arguments.render and (arguments.model is None or arguments.data is None):
        parser.error("--model and --data are needed, unless with --render")
    return arguments


def available_units() -> list[str]:
    """Return which units this processor has, the fastest first; `other` where it has none of those that are named."""
    flags = " ".join(processor_lines("flags")).split()
    return [unit for unit in UNITS if unit in flags] or ["other"]


def write_long_rows(data: Path, target: Path, count: int) -> Path:
    """Write `count` rows with far more text than fits into the context, made of the rows of `data`."""
    from chatglm_tuning.data.records import read_records

    examples = read_records([data]).examples
    with target.open("w", encoding="utf-8") as stream:
        for start in range(count):
            part = examples[start * 200 : start * 200 + 200]
            row = {"content": "".join(e.query for e in part), "summary": "".join(e.answer for e in part)}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return target


def batch_sizes(model: Path, data: Path, batch: int, steps: int) -> dict[str, int]:
    """Return tokens, label tokens and the longest sample of the largest of the first `steps` batches."""
    from chatglm_tuning.data.encode import IGNORED_LABEL, EncodingSettings, encode_examples
    from chatglm_tuning.data.records import read_records
    from chatglm_tuning.model import ChatGLMTokenizer

    examples = read_records([data]).examples[: batch * steps]
    rows = encode_examples(examples, ChatGLMTokenizer.from_pretrained(model), EncodingSettings(_LIMIT, _LIMIT))
    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    largest = max(batches, key=lambda part: sum(len(row.input_ids) for row in part))
    return {
        "tokens": sum(len(row.input_ids) for row in largest),
        "label_tokens": sum(label != IGNORED_LABEL for row in largest for label in row.labels),
        "longest": max(len(row.input_ids) for row in largest),
    }


def measure(row: Row, unit: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run one row in a process of its own and return what it printed last, with what the table needs.

    The first step does not count, for it compiles kernels; a long one does, being far longer than that takes.
    """
    data = arguments.data
    skipped = 0 if row.is_long else 1
    count = arguments.steps + skipped
    if row.is_long:
        data = write_long_rows(data, folder / "long.jsonl", count)
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "train_step.py"), "--method", row.method]
    command += ["--model", str(arguments.model), "--data", str(data), "--batch", str(row.batch)]
    command += ["--steps", str(count), *row.flags]
    command += ["--quantization_bit", str(row.bits)] if row.bits else []
    environment = {**os.environ, **UNITS[unit], "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    last, steps = lines[-1], lines[:-1]
    sizes = batch_sizes(arguments.model, data, row.batch, count)
    return {
        "name": row.name,
        "unit": unit,
        "method": row.method,
        "bits": row.bits,
        "batch": row.batch,
        **sizes,
        "checkpointing": last["activation_checkpointing"],
        "workspace": last["workspace"],
        "utilisation": [step["utilisation"] for step in steps[skipped:]],
        "seconds": [step["seconds"] for step in steps[skipped:]],
        "first_step_seconds": steps[0]["seconds"],
        "gflops": [step["gflops"] for step in steps],
        "load_seconds": last["load_seconds"],
        "load_gib": last["load_gib"],
        "peak_gib": last["peak_gib"],
    }


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all rows in the order of the table, a new one in the place of an old one of its name."""
    by_key = {(row["unit"], row["name"]): row for row in [*old, *new]}
    order = [(unit, row.name) for unit in UNITS for row in ROWS]
    return [by_key[key] for key in order if key in by_key]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    header = ["work", "products by", "GFLOP/s", "utilisation", "s a step", "first step, s", "load, s", "peak, GiB"]
    header += ["of it loading"]
    lines = [
        [
            row["name"],
            row["unit"],
            f"{statistics.median(row['gflops']):.0f}",
            f"**{statistics.median(row['utilisation']):.2f}** "
            f"({min(row['utilisation']):.2f}–{max(row['utilisation']):.2f})",
            f"{statistics.median(row['seconds']):.2f}",
            f"{row['first_step_seconds']:.1f}",
            f"{row['load_seconds']:.0f}",
            f"{row['peak_gib']:.2f}",
            f"{row['load_gib']:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw peak memory and utilisation of the rows, one bar for each unit."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["name"] for row in rows))
    units = [unit for unit in UNITS if any(row["unit"] == unit for row in rows)]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.55 * len(names) + 1.6), sharey=True, layout="constrained")
    height = 0.8 / len(units)
    for number, unit in enumerate(units):
        found = {row["name"]: row for row in rows if row["unit"] == unit}
        shown = [name for name in names if name in found]
        places = [names.index(name) + (number - (len(units) - 1) / 2) * height for name in shown]
        values = (
            [found[name]["peak_gib"] for name in shown],
            [statistics.median(found[name]["utilisation"]) for name in shown],
        )
        for axis, widths, form in zip(axes, values, ("%.1f", "%.2f"), strict=True):
            axis.bar_label(axis.barh(places, widths, height, label=unit), fmt=form, padding=2, fontsize=8)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("peak resident memory, loading included (GiB)")
    axes[1].set_xlabel("utilisation of the bf16 product rate")
    axes[1].set_xlim(0, 1)
    axes[0].margins(x=0.12)
    figure.legend(
        *axes[1].get_legend_handles_labels(), title="products by", loc="outside lower center", ncols=len(units)
    )
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def render(content: dict[str, Any], document: Path, picture: Path) -> None:
    """Write the table into `document` and the picture beside it."""
    about = machine_sentence(content["machine"])
    replace_section(document, "full-size", f"{about}\n\n{table(content['rows'])}\n\n![]({picture.name})")
    draw(content["rows"], picture)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    content: dict[str, Any] = {"rows": []}
    if arguments.results.is_file():
        content = json.loads(arguments.results.read_text(encoding="utf-8"))
    if not arguments.render:
        content["machine"] = describe_machine()
        with tempfile.TemporaryDirectory() as folder:
            for unit in arguments.units:
                for row in ROWS:
                    if all(word in row.name for word in arguments.only):
                        result = measure(row, unit, arguments, Path(folder))
                        print(json.dumps(result), flush=True)
                        content["rows"] = merge(content["rows"], [result])
                        arguments.results.parent.mkdir(parents=True, exist_ok=True)
                        arguments.results.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.results == RESULTS:
        render(content, DOCUMENT, PICTURE)
    print(table(content["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
