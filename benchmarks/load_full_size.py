"""Read a model's files once, load the model, answer one prompt; print the times, their ratio and the peak memory.

    python benchmarks/load_full_size.py --model DIR [--quantization_bit 4] [--page_cache warm] [--tokens 8]

Both times begin with files that are not in memory (Linux), or with `--page_cache warm` with files that are.
Ends with exit code 1 where the peak exceeds `--limit_gib`, or loading takes more than `--limit_ratio` times as long
as reading.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from measures import add_document_flag, markdown_table, publish

from chatglm_tuning.loading import load_for_inference, peak_memory_bytes
from chatglm_tuning.shards import find_weight_files

_READ_BYTES = 1 << 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--quantization_bit", type=int, choices=(4, 8))
    parser.add_argument("--page_cache", choices=("cold", "warm"), default="cold")
    parser.add_argument("--prompt", default="你好")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--limit_gib", type=float, default=float("inf"))
    parser.add_argument("--limit_ratio", type=float, default=float("inf"))
    add_document_flag(parser)
    return parser.parse_args()


def drop_from_memory(files: Sequence[Path]) -> None:
    """Let the operating system forget what it holds of the files."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())  # what is not on the disk yet would stay
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of_reading(files: Sequence[Path]) -> float:
    """Read all files once, one after the other."""
    buffer = bytearray(_READ_BYTES)
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def peak_gib() -> float:
    """Peak resident memory of this process in GiB, the imported libraries included."""
    peak_bytes = peak_memory_bytes()
    if peak_bytes is None:
        sys.exit("this operating system does not tell a process's peak memory")
    return peak_bytes / 2**30


def main() -> int:
    arguments = parse_arguments()
    files = find_weight_files(arguments.model).files
    is_cold = arguments.page_cache == "cold"
    print(f"imports and checks: peak {peak_gib():.2f} GiB")
    if is_cold:
        drop_from_memory(files)
    else:
        seconds_of_reading(files)
    reading = seconds_of_reading(files)
    if is_cold:
        drop_from_memory(files)
    start = time.perf_counter()
    model, tokenizer = load_for_inference(
        str(arguments.model), quantization_bit=arguments.quantization_bit, show_progress=True
    )
    loading = time.perf_counter() - start
    ratio = loading / reading
    loaded = peak_gib()
    print(
        f"files read in {reading:.1f} s, model loaded in {loading:.1f} s ({arguments.page_cache} page cache): "
        f"ratio {ratio:.2f}; peak {peak_gib():.2f} GiB"
    )
    ids = tokenizer(arguments.prompt, return_tensors="pt")
    start = time.perf_counter()
    out = model.generate(**ids, max_new_tokens=arguments.tokens, do_sample=False)
    answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    print(f"{arguments.prompt} → {answer!r} in {time.perf_counter() - start:.1f} s, peak {peak_gib():.2f} GiB")
    header = ["base", "page cache", "files read once, s", "loaded, s", "ratio", "peak GiB, loading", "and answering"]
    form = f"int{arguments.quantization_bit}" if arguments.quantization_bit else "as stored"
    sizes = (f"{reading:.1f}", f"{loading:.1f}", f"{ratio:.2f}", f"{loaded:.2f}", f"{peak_gib():.2f}")
    table = markdown_table(header, [[form, arguments.page_cache, *sizes]])
    publish("loading", table, arguments.document)
    return int(peak_gib() > arguments.limit_gib or ratio > arguments.limit_ratio)


if __name__ == "__main__":
    sys.exit(main())
