"""How much more a server answers when many ask at once than when one asks at a time.

    python benchmarks/serving.py

A whole server in a process of its own, asked over HTTP. The model is random, of a size whose products take far longer
than HTTP does; every answer has the same number of tokens, so that both ways compute the same. They are measured in
turn, several times in one run: the ratio holds whatever the machine does meanwhile. Three minutes on two cores.
"""

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from measures import markdown_table
from small import write_model

REPOSITORY = Path(__file__).resolve().parent.parent
QUESTION = "类型#上衣*材质#牛仔布*颜色#白色*风格#简约*图案#刺绣*衣样式#外套*衣款式#破洞"


@dataclass(frozen=True)
class Round:
    """Seconds for the same answers, one at a time and all at once."""

    one_at_a_time: float
    at_once: float

    @property
    def ratio(self) -> float:
        """How many times as much is answered at once."""
        return self.one_at_a_time / self.at_once


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[int]:
    """Serve the model of `folder` in a process of its own on a free port, which is given."""
    command = [sys.executable, "-m", "chatglm_tuning", "serve", "--model_name_or_path", str(folder), "--port", "0"]
    server = subprocess.Popen([*command, *flags], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    try:
        found = re.search(rb":(\d+)/v1", server.stdout.readline())
        if found is None:
            raise RuntimeError("the server did not start")
        yield int(found[1])
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def ask(port: int, model: str, tokens: int) -> None:
    """Ask for an answer of `tokens` tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": tokens, "temperature": 0}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    if "usage" not in answer or answer["usage"]["completion_tokens"] != tokens:
        raise RuntimeError(f"this is no answer of {tokens} tokens: {answer}")


def measure(port: int, model: str, *, requests: int, tokens: int) -> Round:
    """Ask `requests` times one after the other, then as often at once."""
    start = time.perf_counter()
    for _ in range(requests):
        ask(port, model, tokens)
    middle = time.perf_counter()
    with ThreadPoolExecutor(requests) as pool:
        for answer in [pool.submit(ask, port, model, tokens) for _ in range(requests)]:
            answer.result()
    return Round(middle - start, time.perf_counter() - middle)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; without it, a random one")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization_bit", help="4 or 8")
    arguments = parser.parse_args(argv)
    flags = ["--served_model_name", "base", "--max_rows", str(arguments.requests), "--dtype", arguments.dtype]
    if arguments.quantization_bit:
        flags += ["--quantization_bit", arguments.quantization_bit]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.model
        if folder is None:
            folder = Path(temporary)
            torch.manual_seed(0)
            write_model(folder)
        with serving(folder, *flags) as port:
            measure(port, "base", requests=2, tokens=arguments.tokens)
            rounds = [
                measure(port, "base", requests=arguments.requests, tokens=arguments.tokens)
                for _ in range(arguments.rounds)
            ]
    tokens = arguments.requests * arguments.tokens
    rows = [[f"{tokens / r.one_at_a_time:.1f}", f"{tokens / r.at_once:.1f}", f"{r.ratio:.2f}"] for r in rounds]
    head = ["one at a time, tokens/s", f"{arguments.requests} at once, tokens/s", "ratio"]
    print(markdown_table(head, rows))
    print(f"ratio: {statistics.median(r.ratio for r in rounds):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
