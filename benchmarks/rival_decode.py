"""chatglm.cpp's side of `decode.py`: run by a Python that has chatglm_cpp, beside it and on its commands.

    python rival_decode.py MODEL_FILE

Reads from its input, a line for an answer, a JSON object with `ids`, the prompt, and `tokens`, how many to draw;
writes a line with the `seconds` that each token took, the prompt's with the first, and the peak memory in `gib`.
"""

import json
import sys
import time
from pathlib import Path

from chatglm_cpp import _C, Pipeline  # pyright: ignore[reportMissingImports]


def peak_gib() -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def main() -> None:
    model = Pipeline(sys.argv[1]).model
    for line in sys.stdin:
        request = json.loads(line)
        ids, length = request["ids"], len(request["ids"])
        settings = _C.GenerationConfig(do_sample=False, max_length=length + request["tokens"])
        seconds, past = [], 0
        for _ in range(request["tokens"]):
            start = time.perf_counter()
            token = model.generate_next_token(ids, None, settings, past, length)
            seconds.append(time.perf_counter() - start)
            past = len(ids)
            ids.append(token)
        print(json.dumps({"seconds": seconds, "gib": peak_gib()}), flush=True)


if __name__ == "__main__":
    main()
