"""Disk, memory and limits."""

import os
import resource
from types import SimpleNamespace

import pytest

from chatglm_tuning.doctor import room
from chatglm_tuning.doctor.room import disk_findings, limit_findings, memory_findings
from chatglm_tuning.estimate import ModelShape

GIB = 2**30
TINY = ModelShape(2, 32, 64, 2, 1000, 256)


def disk(tmp_path, free: float, monkeypatch) -> list:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _path: SimpleNamespace(free=int(free * GIB), total=100 * GIB))
    return list(disk_findings(tmp_path / "not" / "there" / "yet", {"CHATGLM_TUNING_CACHE": str(tmp_path / "cache")}))


@pytest.mark.parametrize(("free", "status"), [(100, "ok"), (4, "warning"), (0.25, "problem")])
def test_room_on_the_disk(free, status, tmp_path, monkeypatch):
    found = disk(tmp_path, free, monkeypatch)
    assert [finding.name for finding in found] == ["output_dir", "cache", "temporary"]
    assert {finding.status for finding in found} == {status}
    assert str(tmp_path) in found[0].what
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    first = next(iter(disk_findings(tmp_path / "out", {})))
    assert (first.status, first.code) == ("problem", "O101")


def test_a_folder_that_the_system_does_not_let_write(tmp_path, monkeypatch):
    monkeypatch.setattr(room.os, "access", lambda _path, _mode: False)
    found = list(disk_findings(tmp_path, {"CHATGLM_TUNING_CACHE": str(tmp_path)}))
    assert [(finding.status, finding.code) for finding in found[:2]] == [("problem", "O101"), ("problem", "O108")]


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    first = next(iter(disk_findings(tmp_path / "file", {})))
    assert first.line.startswith(f"problem  output_dir: {tmp_path}/file is a file")


def test_a_disk_without_room_for_another_file(tmp_path, monkeypatch):
    full = SimpleNamespace(f_files=100, f_favail=0, f_bavail=10**9, f_blocks=10**9, f_bfree=10**9, f_frsize=4096)
    monkeypatch.setattr(room.os, "statvfs", lambda _path: full)
    assert next(iter(disk_findings(tmp_path, {}))).line.startswith("problem  output_dir: ")


def memory(monkeypatch, free: float, total: float, swap: float = 0, limit: int | None = None, **changes):
    monkeypatch.setattr(
        room.psutil, "virtual_memory", lambda: SimpleNamespace(available=int(free * GIB), total=int(total * GIB))
    )
    monkeypatch.setattr(room.psutil, "swap_memory", lambda: SimpleNamespace(total=int(swap * GIB)))
    monkeypatch.setattr(room, "_cgroup_limit", lambda: limit)
    arguments = {"shape": None, "has_gpu": False, "multiplies_bf16": True} | changes
    return next(iter(memory_findings(arguments.pop("shape"), **arguments)))


def test_memory_is_compared_with_the_smallest_run(monkeypatch):
    assert memory(monkeypatch, 20, 24).status == "ok"
    assert memory(monkeypatch, 1, 24).status == "warning"
    assert memory(monkeypatch, 1, 2).status == "problem"
    assert memory(monkeypatch, 1, 2, swap=8).status == "warning"
    assert memory(monkeypatch, 1, 2, shape=TINY).status == "ok"


def test_the_limit_of_a_container_counts(monkeypatch):
    found = memory(monkeypatch, 20, 24, limit=2 * GIB)
    assert found.status == "problem"
    assert "2.0 of 2.0 GiB" in found.what


def test_fp32_takes_more(monkeypatch):
    def needed(**changes) -> float:
        return float(memory(monkeypatch, 20, 24, **changes).what.split()[-1])

    assert needed(multiplies_bf16=False) > needed()


@pytest.mark.parametrize(("megabytes", "status"), [(64, "warning"), (2048, "ok")])
def test_shared_memory(megabytes, status, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _path: SimpleNamespace(total=megabytes << 20))
    last = list(memory_findings(TINY, has_gpu=False, multiplies_bf16=True))[-1]
    assert (last.name, last.status) == ("shared memory", status)


def test_a_limit_file_of_a_container_is_read(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(room, "_CGROUP_LIMIT", limit)
    assert room._cgroup_limit() is None
    limit.write_text("max\n", encoding="ascii")
    assert room._cgroup_limit() is None
    limit.write_text("1073741824\n", encoding="ascii")
    assert room._cgroup_limit() == GIB


def test_limits_of_the_shell(monkeypatch):
    limits = {resource.RLIMIT_NOFILE: 256, resource.RLIMIT_AS: 8 * GIB}
    monkeypatch.setattr(room.resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    assert [finding.status for finding in limit_findings()] == ["warning", "warning"]
    limits = {resource.RLIMIT_NOFILE: 4096, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    assert [finding.line for finding in limit_findings()] == ["ok       open files: 4096 allowed"]
