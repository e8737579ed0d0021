"""Two runs in one folder: the second is refused, and a killed one holds nothing."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from chatglm_tuning.errors import UserError
from chatglm_tuning.folder_lock import LOCK_NAME, only_writer

HOLD = "import sys, time; from pathlib import Path; from chatglm_tuning.folder_lock import only_writer\n"
HOLD += "with only_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """A process that holds `tmp_path / "output"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "output")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path, holder):
    folder = tmp_path / "output"
    with pytest.raises(UserError, match="output: another run is writing here"), only_writer(folder):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (folder / LOCK_NAME).is_file()
    with only_writer(folder):
        pass
    assert list(folder.iterdir()) == []


def test_one_process_may_take_it_again(tmp_path):
    with only_writer(tmp_path), only_writer(tmp_path):
        assert (tmp_path / LOCK_NAME).is_file()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_may_lie_beside_the_folder(tmp_path):
    with only_writer(tmp_path / "new", lock_path=tmp_path / ".new.lock"):
        assert (tmp_path / ".new.lock").is_file()
        assert not (tmp_path / "new").exists()
    assert list(tmp_path.iterdir()) == []


def _take_turns(folder, turns):
    done = 0
    while done < turns:
        try:
            with only_writer(folder):
                with (folder / "mine").open("x"):
                    time.sleep(0.001)
                (folder / "mine").unlink()
                done += 1
        except UserError:
            time.sleep(0.0005)


def test_there_is_never_a_second_though_the_file_goes_with_every_lock(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_take_turns, args=(tmp_path, 100)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
