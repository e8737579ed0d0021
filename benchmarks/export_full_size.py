"""Export a random LoRA on an int4 or int8 base, merged, and print the time, the peak memory and the certificate.

    python benchmarks/export_full_size.py --model DIR --work DIR [--quantization_bit 4] [--limit_gib 8] [-- FLAGS]

`--model` is a base, in full precision or quantised; what stands behind `--` goes to `chatglm-tuning export`. The LoRA
and the export are written into the folder `--work` and removed again. Ends with exit code 1 where the export fails,
its certificate does not hold, or its process had more than `--limit_gib` in memory.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from make_random_lora import write_lora
from measures import markdown_table

from chatglm_tuning.config.arguments import LORA_TARGETS

_POLL_SECONDS = 0.2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quantization_bit", type=int, choices=(4, 8), default=4)
    parser.add_argument("--strength", type=float, default=0.02)
    parser.add_argument("--limit_gib", type=float, default=8.0)
    parser.add_argument("flags", nargs="*")
    return parser.parse_args()


def peak_bytes_of(process: subprocess.Popen) -> int:
    """Watch a process until it ends, and return the largest resident memory that it had (Linux's VmHWM)."""
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    ended = threading.Event()
    threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True).start()
    while not ended.wait(_POLL_SECONDS):
        lines = status.read_text(encoding="ascii").splitlines()
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))])
    return peak


def run_export(arguments: argparse.Namespace, adapter: Path, output: Path) -> tuple[int, float, int]:
    """Return the exit code of the export, its seconds, and its peak memory in bytes."""
    argv = [sys.executable, "-m", "chatglm_tuning", "export", "--model_name_or_path", str(arguments.model)]
    argv += ["--lora_checkpoint", str(adapter), "--output_dir", str(output)]
    argv += ["--quantization_bit", str(arguments.quantization_bit), *arguments.flags]
    start = time.perf_counter()
    process = subprocess.Popen(argv)
    peak = peak_bytes_of(process)
    return process.returncode, time.perf_counter() - start, peak


def main() -> int:
    arguments = parse_arguments()
    adapter, output = arguments.work / "random-lora", arguments.work / "random-export"
    given = {"rank": 8, "alpha": 32, "targets": list(LORA_TARGETS), "strength": arguments.strength}
    write_lora(argparse.Namespace(model=arguments.model, output=adapter, **given))
    try:
        code, seconds, peak = run_export(arguments, adapter, output)
        peak_gib = peak / 2**30
        rows = [["seconds", f"{seconds:.0f}"], ["peak memory, GiB", f"{peak_gib:.2f} (limit {arguments.limit_gib})"]]
        holds = False
        if code == 0:
            certificate = json.loads((output / "certificate.json").read_text(encoding="utf-8"))
            holds = certificate["holds"]
            rows.append(["certificate holds", str(holds)])
            rows += [[name.replace("_", " "), str(value)] for name, value in certificate["measured"].items()]
            rows += [
                [f"limit of {name.replace('_', ' ')}", str(value)] for name, value in certificate["limits"].items()
            ]
        print(markdown_table(["export", "measured"], rows))
        return 0 if code == 0 and holds and peak_gib <= arguments.limit_gib else 1
    finally:
        shutil.rmtree(adapter, ignore_errors=True)
        shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
