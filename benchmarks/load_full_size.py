"""Load a model, answer one prompt, and print the peak resident memory and the times.

    python benchmarks/load_full_size.py --model DIR [--quantization_bit 4] [--tokens 8]

Ends with exit code 1 where the peak exceeds `--limit_gib`.
"""

import argparse
import sys
import time
from pathlib import Path

from chatglm_tuning.loading import load_for_inference


def peak_gib() -> float:
    """Peak resident memory of this process in GiB (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return kib / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--quantization_bit", type=int, choices=(4, 8))
    parser.add_argument("--prompt", default="你好")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--limit_gib", type=float, default=float("inf"))
    arguments = parser.parse_args()
    start = time.perf_counter()
    model, tokenizer = load_for_inference(
        arguments.model, quantization_bit=arguments.quantization_bit, show_progress=True
    )
    print(f"loaded in {time.perf_counter() - start:.1f} s, peak {peak_gib():.2f} GiB")
    ids = tokenizer(arguments.prompt, return_tensors="pt")
    start = time.perf_counter()
    out = model.generate(**ids, max_new_tokens=arguments.tokens, do_sample=False)
    answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    print(f"{arguments.prompt} → {answer!r} in {time.perf_counter() - start:.1f} s, peak {peak_gib():.2f} GiB")
    return int(peak_gib() > arguments.limit_gib)


if __name__ == "__main__":
    sys.exit(main())
