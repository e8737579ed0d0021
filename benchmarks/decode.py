"""Seconds a token takes in greedy decoding on the CPU, beside the memory's read bandwidth and a rival engine.

    python benchmarks/decode.py --model DIR --quantization_bit 4
        [--rival_python PATH --rival_model FILE]

The rival is chatglm.cpp: `--rival_python` is a Python that has chatglm_cpp, `--rival_model` what `make_random_ggml.py`
wrote. Both engines take turns, so that a machine whose speed changes changes both. The floor is the time to read every
byte of a token's weights at the bandwidth measured in the same run. Prints one JSON line a figure, then a table.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any, cast

import torch
from measures import GIB, add_document_flag, forget_resident_peak, markdown_table, publish, resident_peak_bytes

from chatglm_tuning.inference.stream import GenerationSettings, stream_tokens
from chatglm_tuning.loading import load_base

_READ_BYTES = 2**30
_FIRST_WORD, _LAST_WORD = 5, 100000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--quantization_bit", type=int, choices=(4, 8))
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=24, help="tokens drawn in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rival_python")
    parser.add_argument("--rival_model")
    add_document_flag(parser)
    return parser.parse_args()


def read_bandwidth(repeats: int = 7) -> float:
    """Return bytes per second of summing a gibibyte of integers, the median of some."""
    numbers = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return _READ_BYTES / statistics.median(seconds)


def bytes_per_token(model: torch.nn.Module) -> int:
    """Return the bytes of all weights, each of which a token reads once; the embeddings are the head's."""
    return sum(parameter.nbytes for parameter in model.parameters())


def decode(model: Any, ids: list[int], tokens: int) -> list[float]:
    """Return the seconds that every token took, the prompt's with the first."""
    settings = GenerationSettings(max_length=len(ids) + tokens, do_sample=False, temperature=1.0, top_p=1.0)
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in stream_tokens(model, torch.tensor([ids]), settings=settings)]
    return [end - start for start, end in itertools.pairwise(times)]


class Rival:
    """chatglm.cpp in a process of its own."""

    def __init__(self, python: str, model: str) -> None:
        script = Path(__file__).with_name("rival_decode.py")
        command = [python, str(script), model]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.gib = 0.0

    def decode(self, ids: list[int], tokens: int) -> list[float]:
        """Return the seconds that every token took, the prompt's with the first."""
        stdin, stdout = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        stdin.write(json.dumps({"ids": ids, "tokens": tokens}) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        self.gib = answer["gib"]
        return answer["seconds"]

    def close(self) -> None:
        """End the process."""
        cast("IO[str]", self._process.stdin).close()
        self._process.wait()


def report(name: str, rounds: list[list[float]], read_bytes: int, bandwidth: float, gib: float) -> dict[str, Any]:
    """Return the medians of an engine; the floor is the time that reading its weights takes."""
    token = statistics.median(second for seconds in rounds for second in seconds[1:])
    return {
        "engine": name,
        "prompt_s": round(statistics.median(seconds[0] for seconds in rounds), 2),
        "token_s": round(token, 4),
        "rounds_token_s": [round(statistics.median(seconds[1:]), 4) for seconds in rounds],
        "gb_per_token": round(read_bytes / 1e9, 2),
        "share_of_bandwidth": round(read_bytes / bandwidth / token, 2),
        "peak_gib": round(gib, 2),
    }


def main() -> None:
    arguments = parse_arguments()
    bandwidth = [read_bandwidth()]
    start = time.perf_counter()
    base = load_base(arguments.model, quantization_bit=arguments.quantization_bit, dtype=torch.bfloat16)
    print(json.dumps({"load_s": round(time.perf_counter() - start, 1)}), flush=True)
    rival = None
    if arguments.rival_python and arguments.rival_model:
        rival = Rival(arguments.rival_python, arguments.rival_model)
    else:
        print("no rival: give --rival_python and --rival_model", file=sys.stderr)
    words = torch.randint(_FIRST_WORD, _LAST_WORD, (arguments.prompt - 2,), generator=torch.manual_seed(0))
    ids = [*words.tolist(), base.config.gmask_token_id, base.config.bos_token_id]
    ours, theirs, peak = [], [], 0
    decode(base.model, ids, 3)  # compiles, and fills buffers that stay
    for _ in range(arguments.rounds):
        forget_resident_peak()  # measuring the bandwidth takes memory, too
        ours.append(decode(base.model, ids, arguments.tokens))
        peak = max(peak, resident_peak_bytes())
        if rival is not None:
            theirs.append(rival.decode(ids, arguments.tokens))
        bandwidth.append(read_bandwidth())
    rate = statistics.median(bandwidth)
    print(json.dumps({"read_gb_per_s": [round(value / 1e9, 1) for value in bandwidth]}), flush=True)
    rows = [report("chatglm-tuning", ours, bytes_per_token(base.model), rate, peak / GIB)]
    if rival is not None:
        rows.append(report("chatglm.cpp", theirs, Path(arguments.rival_model).stat().st_size, rate, rival.gib))
        rival.close()
    for row in rows:
        print(json.dumps(row))
    header = ["engine", f"{arguments.prompt} tokens of prompt, s", "s a token", "GB a token"]
    header += [f"share of the read bandwidth ({rate / 1e9:.1f} GB/s)", "peak GiB"]
    lines = [[str(value) for key, value in row.items() if key != "rounds_token_s"] for row in rows]
    publish("decoding", markdown_table(header, lines), arguments.document)


if __name__ == "__main__":
    main()
