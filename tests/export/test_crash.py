"""An export that is killed leaves nothing that could be taken for whole, and one anew has the bytes of the first."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import chatglm_tuning.export.weights as weights_module
import chatglm_tuning.new_folder as writing
from chatglm_tuning.cli.main import run_command
from tests.model_folder import EMBEDDED

KILLED = """
import os, signal, sys
from chatglm_tuning.cli.main import run_command
import chatglm_tuning.new_folder as writing
import chatglm_tuning.export.certificate as certificates
writing._BYTES_OF_A_FILE = 20_000
module, name = {"a shard": (writing, "save_file"), "the certificate": (certificates, "write_certificate")}[sys.argv[1]]
whole = getattr(module, name)
def and_die(*arguments, **more):
    whole(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(module, name, and_die)
sys.exit(run_command("export", sys.argv[2:]))
"""


def argv_of(base_folder, lora, output):
    return ["--model_name_or_path", str(base_folder), "--lora_checkpoint", str(lora), "--output_dir", str(output)]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("moment", ["a shard", "the certificate"])
def test_after_a_kill_the_same_bytes_are_written(base_folder, lora, tmp_path, moment, monkeypatch):
    monkeypatch.setattr(writing, "_BYTES_OF_A_FILE", 20_000)
    argv = argv_of(base_folder, lora, tmp_path / "output")
    done = subprocess.run([sys.executable, "-c", KILLED, moment, *argv], check=False, capture_output=True)
    assert done.returncode == -9
    assert {path.name for path in tmp_path.iterdir()} == {".output.part", ".output.lock"}
    assert run_command("export", argv) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
    (tmp_path / "undisturbed").mkdir()
    assert run_command("export", argv_of(base_folder, lora, tmp_path / "undisturbed" / "output")) == 0
    assert contents(tmp_path / "output") == contents(tmp_path / "undisturbed" / "output")


@pytest.mark.slow
def test_25_kills_at_any_moment(tmp_path, lora_of_embedded):
    def start(output):
        argv = [sys.executable, "-m", "chatglm_tuning", "export", *argv_of(EMBEDDED, lora_of_embedded, output)]
        return subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    (tmp_path / "undisturbed").mkdir()
    begun = time.monotonic()
    assert start(tmp_path / "undisturbed" / "output").wait() == 0
    seconds = time.monotonic() - begun
    expected = contents(tmp_path / "undisturbed" / "output")
    output, moments, kills = tmp_path / "output", random.Random(0), 0
    for _ in range(200):
        running = start(output)
        # What comes before the first write is not of interest: most of the time goes into imports.
        time.sleep(moments.uniform(0.5, 1.0) * seconds)
        running.kill()
        if running.wait() == -signal.SIGKILL:
            kills += 1
        if output.exists():
            assert contents(output) == expected
            shutil.rmtree(output)
        if kills == 25:
            break
    assert kills == 25
    assert start(output).wait() == 0
    assert contents(output) == expected


@pytest.fixture(scope="module")
def lora_of_embedded(tmp_path_factory):
    from tests.export.adapters import write_lora

    return write_lora(tmp_path_factory.mktemp("embedded") / "lora", EMBEDDED, strength=0.02)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_left_of_an_export_that_breaks_off(base_folder, lora, tmp_path, monkeypatch, capsys, error):
    def fail(*_arguments, **_more):
        raise error

    monkeypatch.setattr(writing, "save_file", fail)
    expected = 130 if isinstance(error, KeyboardInterrupt) else 2
    assert run_command("export", argv_of(base_folder, lora, tmp_path / "output")) == expected
    assert list(tmp_path.iterdir()) == []
    message = capsys.readouterr().err
    assert ("No space left on device" in message) == (expected == 2)
    assert message.endswith("output was not written, and nothing is left of it\n") == (expected == 130)


def test_too_little_room_is_told_before_weights_are_read(base_folder, lora, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weights_module, "iterate_tensors", lambda _files: pytest.fail("the weights were read"))
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    assert run_command("export", argv_of(base_folder, lora, tmp_path / "output")) == 2
    assert "KiB are needed and 1000 bytes are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_of_a_killed_run_is_not_removed(base_folder, lora, tmp_path, capsys):
    mine = tmp_path / ".output.part" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("keep", encoding="utf-8")
    assert run_command("export", argv_of(base_folder, lora, tmp_path / "output")) == 2
    assert "holds other files (notes.txt)" in capsys.readouterr().err
    assert mine.read_text(encoding="utf-8") == "keep"


def test_nothing_in_it_tells_when_it_was_written(base_folder, lora, tmp_path, monkeypatch):
    assert run_command("export", argv_of(base_folder, lora, tmp_path / "output")) == 0
    first = contents(tmp_path / "output")
    shutil.rmtree(tmp_path / "output")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert run_command("export", argv_of(base_folder, lora, tmp_path / "output")) == 0
    assert contents(tmp_path / "output") == first
    assert json.loads(first[next(path for path in first if path.name == "certificate.json")])["holds"]
