"""Launches of several processes by torchrun, one of which may be lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from chatglm_tuning.training.callbacks import LOG_NAME, read_log
from tests.model_folder import REPOSITORY
from tests.training.commands import FAST, environment

IN_TURN = REPOSITORY / "tests" / "training" / "in_turn.py"


def torchrun(processes: int, *flags: str) -> list[str]:
    """The launcher on one machine, with the rendezvous that launches of several machines use too."""
    rendezvous = [] if any(flag.startswith("--rdzv") for flag in flags) else ["--standalone"]
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", *rendezvous, *flags]


def arguments_file(folder: Path, **changes) -> Path:
    """The JSON file of a run into `folder`, beside it."""
    path = folder.with_suffix(".json")
    path.write_text(json.dumps({**FAST, "output_dir": str(folder), **changes}), encoding="utf-8")
    return path


def run_in_turn(runs: list[list[str]], processes: int, folder: Path) -> str:
    """Train `runs`, each a method and its flags, one after the other in one launch; returns its standard error."""
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / f"runs-{processes}.json"
    plan.write_text(json.dumps(runs), encoding="utf-8")
    launcher = [sys.executable] if processes == 1 else torchrun(processes)
    done = subprocess.run(
        [*launcher, str(IN_TURN), str(plan)],
        env=environment(folder / "cache"),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def start(argv: list[str], cache: Path, log: Path) -> subprocess.Popen:
    """Start a launch; what it prints goes into the file `log`."""
    # Without it torchrun's restarts meet the addresses of the workers that are gone: see docs/distributed.md.
    settings = {**environment(cache), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with log.open("w", encoding="utf-8") as stream:
        return subprocess.Popen(argv, env=settings, stdout=stream, stderr=stream, cwd=REPOSITORY)


def worker_of(launch: subprocess.Popen, rank: int) -> psutil.Process | None:
    """The training process of that rank, None where it is not running."""
    for child in psutil.Process(launch.pid).children():
        try:
            if child.environ().get("RANK") == str(rank):
                return child
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return None


def kill_worker(
    launch: subprocess.Popen,
    output: Path,
    rank: int,
    *,
    at_step: int,
    delay: float = 0.0,
    until: Callable[[], bool] = lambda: True,
) -> bool:
    """kill -9 a worker `delay` seconds after it has trained up to `at_step`, as soon as `until`.

    Returns whether it was there to be killed.
    """
    started = time.time()
    deadline = time.monotonic() + 240
    log = output / LOG_NAME
    while time.monotonic() < deadline and launch.poll() is None:
        lines = read_log(output) if log.is_file() and log.stat().st_mtime >= started else []
        if lines and lines[-1]["step"] >= at_step and until():
            time.sleep(delay)
            worker = worker_of(launch, rank) if launch.poll() is None else None
            if worker is not None:
                os.kill(worker.pid, signal.SIGKILL)
            return worker is not None
        time.sleep(0.001)
    return False
