"""A folder that appears whole: where it may stand, and that one run writes it."""

import os
import subprocess
import sys

import pytest

from chatglm_tuning.errors import UserError
from chatglm_tuning.new_folder import appearing_whole, check_new_folder
from chatglm_tuning.wording import told_size

HOLDING = """
import sys
from pathlib import Path
from chatglm_tuning.folder_lock import only_writer
output = Path(sys.argv[1])
with only_writer(output, lock_path=output.parent / f".{output.name}.lock"):
    print("held", flush=True)
    input()
"""


def write(output):
    check_new_folder(output)
    with appearing_whole(output) as folder:
        (folder / "config.json").write_text("{}")


def test_the_folder_one_stands_in_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the folder that the command is run in"):
        check_new_folder(tmp_path.__class__("."))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_followed(tmp_path, is_there):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.parent.mkdir()
    if is_there:
        target.mkdir()
    link.symlink_to(target)
    write(link)
    assert link.is_symlink()
    assert (link / "config.json").read_text() == (target / "config.json").read_text() == "{}"
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(UserError, match="cannot be followed"):
        check_new_folder(tmp_path / "one")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder that nobody can write to")
def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for output in ("/proc/output", tmp_path / "file" / "output"):
        with pytest.raises(UserError, match="output_dir cannot be written"):
            check_new_folder(tmp_path.__class__(output))


def test_another_run_is_not_disturbed(tmp_path):
    output = tmp_path / "output"
    unfinished = tmp_path / ".output.part"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("of the other run")
    argv = [sys.executable, "-c", HOLDING, str(output)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing here"):
            write(output)
        assert (unfinished / "config.json").read_text() == "of the other run"
        other.communicate("\n")
    write(output)
    assert (output / "config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_what_another_run_has_finished_meanwhile_is_kept(tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.json").write_text("of the other run")
    with pytest.raises(UserError, match="there already"), appearing_whole(output):
        pytest.fail("the work was begun")
    assert (output / "config.json").read_text() == "of the other run"


def test_sizes_have_a_unit_in_which_they_can_be_told():
    sizes = (0, 1023, 1536, 5 << 20, 3 << 30)
    assert [told_size(size) for size in sizes] == ["0 bytes", "1023 bytes", "1.50 KiB", "5.00 MiB", "3.00 GiB"]
