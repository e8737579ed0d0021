"""A worker that is killed under torchrun: nothing is lost, and a restart ends with the same bytes."""

import os
import random
import re
import socket
import time

import pytest
import torch
from safetensors.torch import load_file

from chatglm_tuning.checkpoint import step_of_checkpoint, whole_checkpoints
from chatglm_tuning.training.checkpoints import PART_NAME
from tests.model_folder import write_rows, write_tiny_model
from tests.training.commands import adapter_bytes, losses, run
from tests.training.launches import arguments_file, kill_worker, start, torchrun, worker_of

METHODS = {
    "lora": ("train_lora.py", ["--lora_dropout", "0.1"]),
    "ptuning": ("train_ptuning.py", ["--pre_seq_len", "4", "--quantization_bit", "4"]),
}
STEPS = 12
SECONDS_TO_END = 60  # torchrun gives its workers 30 s before it kills them


class Runs:
    """One run of a method on some processes, undisturbed and disturbed."""

    def __init__(self, folder, method, processes):
        self.folder, self.processes = folder, processes
        script, flags = METHODS[method]
        model = write_tiny_model(folder / "model")
        rows = write_rows(folder / "rows.json", 40)
        self.command = [script, "--model_name_or_path", str(model), "--data_path", str(rows), "--dtype", "float32"]
        self.command += ["--max_input_length", "64", "--max_output_length", "96", *flags]
        self.cache = folder / "cache"
        self.killed = folder / "killed"
        self.log = folder / "log"

    def argv(self, output, *launch_flags, processes=None):
        file = arguments_file(output, max_steps=STEPS, resume_from_checkpoint="auto", tripwires="warn")
        launcher = torchrun(processes or self.processes, *launch_flags)
        return [*launcher, *self.command, "--train_args_file", str(file)]

    def launch(self, *launch_flags, **changes):
        """Start the run that is to be killed."""
        return start(self.argv(self.killed, *launch_flags, **changes), self.cache, self.log)

    def assert_same_as_undisturbed(self):
        whole = self.folder / "undisturbed"
        if not whole.exists():
            run(self.argv(whole), self.cache)
        assert len(losses(whole)) == STEPS
        if self.processes == 2:
            assert losses(self.killed) == losses(whole)
            assert adapter_bytes(self.killed) == adapter_bytes(whole)
            return
        # DDP lays its buckets anew after the first step of a process, and the ring adds up three numbers in an order
        # that depends on where they lie: a step after a restart may differ in the last bit.
        assert [step for step, _ in losses(self.killed)] == [step for step, _ in losses(whole)]
        torch.testing.assert_close(
            [loss for _, loss in losses(self.killed)], [loss for _, loss in losses(whole)], rtol=1e-6, atol=0
        )
        found, expected = (load_file(next(folder.glob("*.safetensors"))) for folder in (self.killed, whole))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def ended(launch):
    """Wait for a launch that has lost a worker; returns its exit code."""
    started = time.monotonic()
    code = launch.wait(timeout=240)
    print(f"ended with {code} after {time.monotonic() - started:.1f} s")
    return code


def test_a_lost_worker_is_started_again_and_the_run_ends_with_the_same_bytes(tmp_path):
    runs = Runs(tmp_path, "lora", 2)
    launch = runs.launch("--max_restarts=1")
    assert kill_worker(launch, runs.killed, 1, at_step=7)  # within the second epoch
    assert ended(launch) == 0
    assert re.search(r"resuming from .*checkpoint-[68]\n", runs.log.read_text(encoding="utf-8"))
    runs.assert_same_as_undisturbed()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_without_restarts_a_lost_worker_ends_the_run_in_time_and_loses_nothing(tmp_path, rank):
    runs = Runs(tmp_path, "lora", 2)
    launch = runs.launch("--max_restarts=0")
    assert kill_worker(launch, runs.killed, rank, at_step=5)
    started = time.monotonic()
    assert ended(launch) == 1
    assert time.monotonic() - started < SECONDS_TO_END
    log = runs.log.read_text(encoding="utf-8")
    assert "another process of this run, or the network to it, was lost" in log
    assert re.search(r"checkpoint-[46] is whole, nothing before it is lost", log)
    assert re.search(rf"Root Cause .*\n(.*\n)*  rank      : {rank} .*\n  exitcode  : -9 ", log)
    newest = next(whole_checkpoints(runs.killed))
    assert step_of_checkpoint(newest) in (4, 6)
    assert not (runs.killed / "chatglm_tuning.json").exists()
    run(runs.argv(runs.killed), runs.cache)  # the same command again
    runs.assert_same_as_undisturbed()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_lost_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, rank):
    runs = Runs(tmp_path, "lora", 2)
    launch = runs.launch("--max_restarts=0")
    assert kill_worker(launch, runs.killed, rank, at_step=4, until=(runs.killed / PART_NAME).exists)
    assert ended(launch) == 1
    assert {step_of_checkpoint(path) for path in runs.killed.glob("checkpoint-*")} <= {2, 4, 6, 8}
    assert [path for path in runs.killed.glob("checkpoint-*") if path not in whole_checkpoints(runs.killed)] == []
    run(runs.argv(runs.killed), runs.cache)
    runs.assert_same_as_undisturbed()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("method", list(METHODS))
def test_workers_killed_again_and_again_end_with_the_same_bytes(tmp_path, method, processes):
    """`make slow-elastic`; CHATGLM_TUNING_KILLS: how often, of each method and number of processes."""
    kills = int(os.environ.get("CHATGLM_TUNING_KILLS", "4"))
    draw = random.Random(processes)
    runs = Runs(tmp_path, method, processes)
    hits = []
    while len(hits) < kills:
        runs.killed = tmp_path / f"killed-{len(hits)}"
        launch = runs.launch(f"--max_restarts={kills}")
        while (done := steps_done(runs.killed)) < STEPS and len(hits) < kills:
            step, rank = draw.randint(done + 1, STEPS), draw.randrange(processes)
            if not kill_worker(launch, runs.killed, rank, at_step=step, delay=draw.random() * 0.1):
                break
            hits.append((rank, step))
        assert ended(launch) == 0
        runs.assert_same_as_undisturbed()
    print(f"{method} on {processes} processes: killed (rank, after step) {hits}")


def steps_done(folder):
    """The step of the newest whole checkpoint, 0 where there is none."""
    newest = next(whole_checkpoints(folder), None) if folder.is_dir() else None
    return 0 if newest is None else step_of_checkpoint(newest)


@pytest.mark.slow
def test_two_launchers_as_on_two_machines_restart_together(tmp_path):
    runs = Runs(tmp_path, "lora", 2)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    rendezvous = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test"]
    first = runs.launch(*rendezvous, "--max_restarts=2", processes=1)
    second = start(
        runs.argv(runs.killed, *rendezvous, "--max_restarts=2", processes=1), runs.cache, tmp_path / "second"
    )
    victim = second if worker_of_eventually(second, 1) else first
    assert kill_worker(victim, runs.killed, 1, at_step=5)
    assert [ended(first), ended(second)] == [0, 0]
    runs.assert_same_as_undisturbed()


def worker_of_eventually(launch, rank):
    """Whether `launch` comes to have the worker of that rank, where the other launcher has it otherwise."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if worker_of(launch, rank) is not None:
            return True
        if worker_of(launch, 1 - rank) is not None:
            return False
        time.sleep(0.05)
    return False
