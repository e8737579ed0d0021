"""Rates of the machine, memory, and the products that a step cannot do without: what benchmarks measure alike."""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from chatglm_tuning.model import ChatGLMConfig

GIB = 2**30
_ROWS, _INNER, _COLUMNS = 512, 4096, 16384


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of `repeats` runs of `work`, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def product_rate(device: torch.device, dtype: torch.dtype, repeats: int = 15) -> float:
    """Return FLOP per second of a 512×4096 by 4096×16384 product in `dtype`."""
    left = torch.randn(_ROWS, _INNER, dtype=dtype, device=device)
    right = torch.randn(_COLUMNS, _INNER, dtype=dtype, device=device)
    return 2 * _ROWS * _INNER * _COLUMNS / median_seconds(lambda: left @ right.T, device, repeats)


def read_rate(device: torch.device, repeats: int = 5) -> float:
    """Return bytes per second of reading memory, a copy counted as two reads."""
    source = torch.ones(2**29 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats)


def useful_flop(config: ChatGLMConfig, tokens: int, label_tokens: int) -> int:
    """Return the FLOPs of the forward pass and of the input gradients of real tokens.

    2 · 2 · (layers · 12 · hidden² · tokens + label_tokens · hidden · vocab): nothing for recomputing, padding or the
    gradients of weights.
    """
    layers = config.num_layers * 12 * config.hidden_size**2
    return 4 * (layers * tokens + label_tokens * config.hidden_size * config.vocab_size)


def resident_peak_bytes() -> int:
    """Return the peak resident memory of this process (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def forget_resident_peak() -> None:
    """Let `resident_peak_bytes` count from now on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def live_peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes of tensors `work` holds at most, beyond those that were there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None
    recorded = profile.profiler.kineto_results
    assert recorded is not None
    held = peak = 0
    for event in sorted(recorded.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def processor_lines(name: str) -> list[str]:
    """Return what Linux says of every core under `name`, such as `model name` or `flags`."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name]


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    names = processor_lines("model name")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def machine_sentence(machine: Mapping[str, Any]) -> str:
    """Return what `describe_machine` found as a line of text."""
    return f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}."


def add_document_flag(parser: argparse.ArgumentParser) -> None:
    """Let a benchmark be told where its table goes; see `publish`."""
    parser.add_argument("--document", type=Path, help="Markdown file whose section for this table is replaced")


def publish(name: str, table: str, document: Path | None) -> None:
    """Print a table, and put it with the machine into the section `name` of `document`, where one is given."""
    print(f"\n{table}")
    if document is not None:
        replace_section(document, name, f"{machine_sentence(describe_machine())}\n\n{table}")


def replace_section(file: Path, name: str, text: str) -> None:
    """Put `text` between the markers `<!-- name:begin -->` and `<!-- name:end -->` of a Markdown file."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    content = file.read_text(encoding="utf-8")
    before, after = content.split(begin)[0], content.split(end)[1]
    file.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
