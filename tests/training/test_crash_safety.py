"""What must not lose anything: torn checkpoints, a full disk, SIGTERM, two runs in one folder, a clock that jumps."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from chatglm_tuning.checkpoint import MANIFEST_NAME, read_manifest, whole_checkpoints
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.folder_lock import LOCK_NAME, only_writer
from chatglm_tuning.training import checkpoints as checkpoints_module
from chatglm_tuning.training import disk as disk_module
from chatglm_tuning.training import run as run_module
from chatglm_tuning.training.callbacks import LOG_NAME, RunLog, read_log
from chatglm_tuning.training.trainer import TuningTrainer
from tests.model_folder import REPOSITORY, write_rows, write_tiny_model
from tests.training.commands import FAST, adapter_bytes, command, environment, losses

METHODS = {"lora": ("train-lora", ["--lora_dropout", "0.1"]), "ptuning": ("train-ptuning", ["--pre_seq_len", "4"])}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.json", 24)


@pytest.fixture
def tune(model, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("CHATGLM_TUNING_CACHE", str(tmp_path.parent / "cache"))

    def start(method, *flags, output="run", **changes):
        folder = tmp_path / output
        settings = {**FAST, "max_steps": 6, "output_dir": str(folder), **changes}
        (tmp_path / f"{output}.json").write_text(json.dumps(settings), encoding="utf-8")
        name, own = METHODS[method]
        argv = ["--train_args_file", tmp_path / f"{output}.json", "--model_name_or_path", model, "--data_path", rows]
        argv += ["--dtype", "float32", "--max_input_length", 64, "--max_output_length", 96, *own, *flags]
        return run_command(name, list(map(str, argv))), folder

    return start


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def places_in(file):
    """Positions of every byte class of a file: its ends, its header where it has one, and its values."""
    size = file.stat().st_size
    return sorted({0, 1, 7, 8, 9, size // 4, size // 2, size - 9, size - 2, size - 1} & set(range(size)))


@pytest.mark.parametrize("method", list(METHODS))
def test_a_bit_that_flips_anywhere_in_a_checkpoint_is_seen_and_the_one_before_is_taken(tune, method, caplog):
    _, folder = tune(method, max_steps=6)
    newest = folder / "checkpoint-6"
    names = sorted(path.name for path in newest.iterdir())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST_NAME} < set(names)
    checked = 0
    for name in names:
        file = newest / name
        whole = file.read_bytes()
        for place in places_in(file):
            flipped = bytes([whole[place] ^ 0x10])
            file.write_bytes(whole[:place] + flipped + whole[place + 1 :])
            assert next(whole_checkpoints(folder)).name == "checkpoint-4", (name, place)
            checked += 1
        for length in [size for size in places_in(file) if whole[size:] != b"\n"]:
            file.write_bytes(whole[:length])
            assert next(whole_checkpoints(folder)).name == "checkpoint-4", (name, length)
            checked += 1
        file.unlink()
        assert next(whole_checkpoints(folder)).name == "checkpoint-4", name
        file.write_bytes(whole)
    assert checked > 100
    assert next(whole_checkpoints(folder)).name == "checkpoint-6"


@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_goes_on_from_the_checkpoint_before_a_torn_one_and_says_so(tune, method, caplog):
    _, folder = tune(method)
    whole = adapter_bytes(folder)
    file = folder / "checkpoint-6" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        code, _ = tune(method, "--resume_from_checkpoint", folder)
    assert code == 0
    assert f"{folder / 'checkpoint-6'} is passed over ({file}: the adapter is damaged" in caplog.text
    assert "checkpoint-4 is taken instead" in caplog.text
    assert adapter_bytes(folder) == whole
    assert next(whole_checkpoints(folder)).name == "checkpoint-6"


@pytest.mark.parametrize("method", list(METHODS))
def test_a_save_that_fails_leaves_the_checkpoint_before_and_nothing_half_written(tune, capsys, monkeypatch, method):
    real = checkpoints_module.write_manifest

    def write(folder, *arguments):
        if folder.name == "checkpoint-4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(folder, *arguments)

    monkeypatch.setattr(checkpoints_module, "write_manifest", write)
    code, folder = tune(method, save_total_limit=1)
    error = capsys.readouterr().err
    assert code == 2
    assert "the run cannot write its files (no space is left on the disk)" in error
    assert f"--resume_from_checkpoint {folder / 'checkpoint-2'}" in error
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "loss.png", LOG_NAME]
    monkeypatch.undo()
    code, _ = tune(method, "--resume_from_checkpoint", folder)
    assert code == 0


def test_an_error_of_another_kind_is_not_taken_for_the_disks(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), disk_module.told_disk_errors(tmp_path):
        raise RuntimeError("shape mismatch")
    with pytest.raises(FileNotFoundError), disk_module.told_disk_errors(tmp_path):
        (tmp_path / "nothing").read_bytes()


def test_a_checkpoint_that_would_not_fit_is_refused_before_the_first_step(tune, capsys, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(disk_module.shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    code, folder = tune("lora")
    assert code == 2
    assert "a checkpoint takes about" in capsys.readouterr().err
    assert not folder.exists()


def test_two_runs_do_not_write_into_one_folder(tune, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    release, held = threading.Event(), threading.Event()

    def hold():
        with only_writer(folder):
            held.set()
            release.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(10)
    try:
        code, _ = tune("lora")
    finally:
        release.set()
        other.join()
    assert code == 2
    assert "another run is writing here" in capsys.readouterr().err
    assert not folder.exists()
    code, _ = tune("lora")
    assert code == 0
    assert not (folder / LOCK_NAME).exists()


@pytest.mark.parametrize("method", list(METHODS))
def test_sigterm_saves_and_the_run_goes_on_to_the_same_bytes(tune, method, monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    _, whole = tune(method, output="whole")
    real = RunLog.on_log

    def on_log(self, args, state, control, logs=None, **keywords):
        real(self, args, state, control, logs, **keywords)
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "on_log", on_log)
    code, folder = tune(method, save_strategy="no")
    assert code == 0
    assert "interrupted" in capsys.readouterr().out
    # The log line is written after the step's own end, so that the next step is the last.
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-4"]
    assert not (folder / MANIFEST_NAME).exists()
    assert f"go on with --resume_from_checkpoint {folder}" in caplog.text
    monkeypatch.undo()
    code, _ = tune(method, "--resume_from_checkpoint", folder)
    assert code == 0
    assert losses(folder) == losses(whole)
    assert adapter_bytes(folder) == adapter_bytes(whole)


def test_sigterm_before_the_first_step_ends_well_and_leaves_nothing(tune, monkeypatch, caplog):
    def load_base(*_arguments, **_keywords):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(run_module, "load_base", load_base)
    before = signal.getsignal(signal.SIGTERM)
    code, folder = tune("lora")
    assert code == 0
    assert "ended before its first step" in caplog.text
    assert not folder.exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_while_libraries_are_imported_ends_well(tmp_path):
    argv = [
        *command("train_lora.py", tmp_path / "run"),
        "--model_name_or_path",
        "nowhere/at/all",
        "--data_path",
        "none",
    ]
    program = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'transformers':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from chatglm_tuning.cli.main import run_command\n"
        "sys.exit(run_command('train-lora', sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv[2:]],
        env=environment(tmp_path / "cache"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr.count("ended before its first step")) == (0, 1), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", list(METHODS))
def test_a_folder_that_is_removed_while_a_run_writes_to_it_is_told(tune, capsys, monkeypatch, method):
    real = TuningTrainer.training_step
    seen = []

    def removing(self, *arguments, **keywords):
        seen.append(1)
        if len(seen) == 3:
            shutil.rmtree(self.args.output_dir)
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(TuningTrainer, "training_step", removing)
    code, folder = tune(method)
    assert code == 2
    message = capsys.readouterr().err
    assert "error [O101]" in message
    assert "was removed or moved" in message
    assert not any(folder.glob("checkpoint-*"))


def test_sigterm_ends_a_process_of_its_own_with_0(model, rows, tmp_path):
    argv = command("train_lora.py", tmp_path / "run", "--model_name_or_path", str(model), "--data_path", str(rows))
    argv += ["--max_input_length", "64", "--max_output_length", "96", "--lora_dropout", "0"]
    text = (tmp_path / "run.json").read_text(encoding="utf-8").replace('"max_steps": 12', '"max_steps": 2000')
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    process = subprocess.Popen(argv, env=environment(tmp_path / "cache"), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(read_log(tmp_path / "run")) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "interrupted" in out
    newest = next(whole_checkpoints(tmp_path / "run"))
    assert read_manifest(newest).settings["steps"] == read_log(tmp_path / "run")[-1]["step"]


def test_a_clock_that_jumps_changes_nothing(tune, monkeypatch):
    _, whole = tune("lora", output="whole")
    real, calls = time.time, []

    def jumping():
        calls.append(1)
        return real() + (1 if len(calls) % 2 else -1) * 3.2e7

    monkeypatch.setattr(time, "time", jumping)
    code, folder = tune("lora", save_total_limit=2)
    assert code == 0
    assert len(calls) > 3
    lines = [line for line in read_log(folder) if "loss" in line]
    assert all(0 <= line["elapsed_seconds"] < 600 and line["remaining_seconds"] >= 0 for line in lines)
    assert adapter_bytes(folder) == adapter_bytes(whole)
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-6", "checkpoint-4"]


def test_a_new_result_replaces_an_old_one_as_a_whole(tune, monkeypatch):
    """Killed between two files of a result that replaces an older one, the folder holds no result, not a mixture."""
    from chatglm_tuning import checkpoint as checkpoint_module

    _, folder = tune("lora")
    real, moved = os.replace, []

    def replace(source, target):
        if ".result.part" in str(source) and os.path.dirname(target) == str(folder):
            moved.append(target)
            if len(moved) == 2:
                raise KeyboardInterrupt
        return real(source, target)

    monkeypatch.setattr(checkpoint_module.os, "replace", replace)
    code, _ = tune("lora", "--resume_from_checkpoint", folder, max_steps=8)
    assert code == 130
    assert not (folder / MANIFEST_NAME).exists()
    assert next(whole_checkpoints(folder)).name == "checkpoint-8"
    assert not (folder / ".result.part").exists()
