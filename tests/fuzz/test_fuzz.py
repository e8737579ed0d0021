"""Readers of what others wrote: any bytes are read or refused with a UserError, in bounded time and memory.

The ordinary suite takes the seeds and some mutations of them; `make slow-fuzz` gives every target to libFuzzer
(CHATGLM_TUNING_FUZZ_SECONDS in all, 600 by default).
"""

import os
import random
import re
import subprocess
import sys

import pytest

import chatglm_tuning.shards
from chatglm_tuning.errors import UserError
from tests.fuzz.targets import TARGETS, make_index
from tests.model_folder import REPOSITORY

_SECONDS = int(os.environ.get("CHATGLM_TUNING_FUZZ_SECONDS", "600"))
_MUTATIONS = 60
_PIECES = (
    b"\0",
    b"\xff\xff\xff\xff",
    b"[" * 2000,
    b"-1",
    b"1e999",
    b"null",
    b'"',
    b"{",
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"../",
)


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """The bytes of `seed`, cut, spliced or changed in a few places; the first one, which chooses the file, stays."""
    content = bytearray(seed)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(1, max(2, len(content)))
        kind = rng.randrange(4)
        if kind == 0:
            del content[place:]
        elif kind == 1 and place < len(content):
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            content[place:place] = rng.choice(_PIECES)
        else:
            other = rng.randrange(1, max(2, len(content)))
            content[place:place] = content[other : other + rng.randrange(1, 200)]
    return bytes(content)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_and_some_mutations_are_read_or_refused(name, tmp_path):
    target = TARGETS[name](tmp_path)
    rng = random.Random(name)
    for seed in target.seeds:
        target.run(seed)
    for _ in range(_MUTATIONS):
        target.run(mutated(rng.choice(target.seeds), rng))


def test_any_other_exception_is_a_failure(tmp_path, monkeypatch):
    """Else nothing above could fail."""
    target = make_index(tmp_path)

    def read(_path):
        raise ArithmeticError("planted")

    monkeypatch.setattr(chatglm_tuning.shards, "read_small_json", read)
    with pytest.raises(ArithmeticError, match="planted"):
        target.run(target.seeds[0])


def test_a_right_folder_is_taken(tmp_path, monkeypatch):
    """Else the mutations of it would show nothing."""
    refusals: list[UserError] = []
    create = UserError.__init__

    def note(self, *args, **kwargs):
        create(self, *args, **kwargs)
        refusals.append(self)

    monkeypatch.setattr(UserError, "__init__", note)
    for name in TARGETS:
        if name not in ("data", "index"):
            target = TARGETS[name](tmp_path / name)
            refusals.clear()
            for seed in target.seeds:
                target.run(seed)
                assert not refusals, (name, seed[:1], refusals)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_libfuzzer_finds_nothing(name, tmp_path):
    pytest.importorskip("atheris")
    seconds = max(1, _SECONDS // len(TARGETS))
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", name, str(seconds), str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        timeout=seconds + 300,
        check=False,
    )
    told = done.stderr.decode("utf-8", "replace")
    figures = dict(re.findall(r"stat::(\w+):\s+(\d+)", told))
    cases, new, peak = (figures.get(key) for key in ("number_of_executed_units", "new_units_added", "peak_rss_mb"))
    print(f"\n{name}: {cases} cases in {seconds} s, {new} of them with new coverage, at most {peak} MB")
    assert done.returncode == 0, f"{told[-4000:]}\nthe case is in {tmp_path}"
    assert int(figures["number_of_executed_units"]) > seconds, "hardly anything was tried"
