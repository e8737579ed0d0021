"""One target under atheris (libFuzzer), in a process of its own: `python -m tests.fuzz.run TARGET SECONDS FOLDER`.

FOLDER keeps the corpus, and the case that failed as `crash-…`. A case may take 30 s, and the process 1 GiB of addresses
beyond what it has when fuzzing begins.
"""

import logging
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path

import atheris
import peft  # noqa: F401  (the libraries before anything is watched: only what is ours is)
import transformers  # noqa: F401
from torch._weights_only_unpickler import Unpickler

_SECONDS_OF_A_CASE = 30
_ROOM_BYTES = 1 << 30
_WORDS = (
    *("null", "true", "NaN", "-1", "0", "1e999", "1.5", "[", "]", "{", "}", '\\"', '\\"a\\"', "99999999999999999999"),
    *("[[[[", "../", "/dev/zero", "[]", "{}", "1099511627776", "\\xff\\xfe", "\\x00", "\\xef\\xbb\\xbf", "\\x1f\\x8b"),
    *("F32", "F64", "I64", "BOOL", "C64", "F8_E4M3", "BF16", "U8", "F4", "(a+)+$", "auto", "float16", "eager"),
)


def main() -> None:
    name, seconds, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    with atheris.instrument_imports(include=["chatglm_tuning"]):
        from tests.fuzz.targets import TARGETS
    Unpickler.load = atheris.instrument_func(Unpickler.load)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    words = folder / "words"
    words.write_text("".join(f'"{word}"\n' for word in _WORDS), encoding="ascii")
    with tempfile.TemporaryDirectory() as work:
        target = TARGETS[name](Path(work))
        for number, seed in enumerate(target.seeds):
            (corpus / f"seed-{number}").write_bytes(seed)
            target.run(seed)
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM_BYTES, used + _ROOM_BYTES))
        longest = max(map(len, target.seeds)) + 4096
        options = [
            *(f"-max_total_time={seconds}", f"-timeout={_SECONDS_OF_A_CASE}", "-rss_limit_mb=3000", f"-dict={words}"),
            *(f"-max_len={longest}", f"-artifact_prefix={folder}/", "-print_final_stats=1", "-seed=1", str(corpus)),
        ]
        atheris.Setup([sys.argv[0], *options], target.run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
