"""The training commands as users start them: a process of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chatglm_tuning.cli.main import run_command
from chatglm_tuning.training.callbacks import LOG_NAME, read_log
from tests.model_folder import REPOSITORY

FAST = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "max_steps": 12,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
}


def command(script: str, folder: Path, *flags: str, processes: int = 1, **changes) -> list[str]:
    """The command line of one run; its JSON file is written beside the output folder."""
    arguments = folder.with_suffix(".json")
    arguments.write_text(json.dumps({**FAST, "output_dir": str(folder), **changes}), encoding="utf-8")
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0", "--standalone"]
    return [*launcher, str(REPOSITORY / script), "--train_args_file", str(arguments), *flags]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "CHATGLM_TUNING_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(argv: list[str], cache: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(argv, env=environment(cache), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_here(argv: list[str], cache: Path) -> None:
    """Do what `run` does, in this process: without the seconds that a new one takes for its imports."""
    at = next(place for place, word in enumerate(argv) if word.endswith(".py"))
    name = Path(argv[at]).stem.replace("_", "-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATGLM_TUNING_CACHE", str(cache))
        assert run_command(name, argv[at + 1 :]) == 0


def run_until_killed(
    argv: list[str], cache: Path, output: Path, *, at_step: int, delay: float, until: Callable[[], bool] | None = None
) -> None:
    """Start the run and kill -9 it `delay` seconds after it has written the log line of `at_step` itself.

    until: what must come true after that line, before the delay begins.
    """
    started = time.time()
    process = subprocess.Popen(
        argv, env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    try:
        while time.monotonic() < deadline and process.poll() is None:
            log = output / LOG_NAME
            # A resumed run drops the lines ahead of its checkpoint when it begins.
            lines = read_log(output) if log.is_file() and log.stat().st_mtime >= started else []
            if lines and lines[-1]["step"] >= at_step:
                while until is not None and not until() and process.poll() is None:
                    time.sleep(0.001)
                time.sleep(delay)
                break
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def losses(output: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_log(output) if "loss" in line]


def adapter_bytes(output: Path) -> dict[str, bytes]:
    names = ("adapter_config.json", "adapter_model.safetensors", "prefix_encoder.safetensors")
    return {name: (output / name).read_bytes() for name in names if (output / name).is_file()}
