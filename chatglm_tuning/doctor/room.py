"""Disk, memory and the system's limits."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from chatglm_tuning.doctor.findings import Finding, ok, problem, warning
from chatglm_tuning.estimate import Batch, ModelShape, Plan, Tuning, estimate

try:
    import resource
except ImportError:  # not on Windows
    resource = None

_GIB = 2**30
_LEAST_DISK_BYTES = _GIB // 2
_ENOUGH_DISK_BYTES = 5 * _GIB
_LEAST_SHARED_BYTES = _GIB
_LEAST_OPEN_FILES = 1024
_SHARED_MEMORY = Path("/dev/shm")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
# The least that a run takes: one row of usual length, everything recomputed.
_LEAST_BATCH = Batch(samples=1, tokens=256, label_tokens=128, longest=256)
_LEAST_PLAN = Plan(checkpointing="on", workspace="chunk")


def disk_findings(output_dir: Path, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the room in the folders that commands write to, and whether they may."""
    home = Path(environment.get("HOME") or Path.home())
    cache = Path(environment.get("CHATGLM_TUNING_CACHE") or home / ".cache" / "chatglm_tuning")
    for name, folder, code in (
        ("output_dir", output_dir, "O101"),
        ("cache", cache, "O108"),
        ("temporary", Path(tempfile.gettempdir()), "O101"),
    ):
        yield _disk_finding(name, folder, code)


def _disk_finding(name: str, folder: Path, code: str) -> Finding:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        return problem(name, f"{place} is a file", code=code, remedy="Give a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        return problem(
            name, f"{place} cannot be written by this user", code=code, remedy="Give a folder that can be written"
        )
    free = shutil.disk_usage(place).free
    what = f"{free / _GIB:.1f} GiB are free in {place}"
    if hasattr(os, "statvfs") and (counts := os.statvfs(place)).f_files and not counts.f_favail:
        return problem(name, f"{place} has no room for another file", code="O102", remedy="Remove files there")
    if free < _LEAST_DISK_BYTES:
        return problem(name, what, code="O102", remedy="Make room, or give a folder on another disk")
    if free < _ENOUGH_DISK_BYTES:
        return warning(name, what, code="O102", remedy="Make room: checkpoints and merged models may not fit")
    return ok(name, what)


def memory_findings(shape: ModelShape | None, *, has_gpu: bool, multiplies_bf16: bool) -> Iterator[Finding]:
    """Yield RAM, swap and shared memory beside what the smallest run takes. shape: None = the released model."""
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        total, free = limit, min(free, limit)
    tuning = Tuning(method="lora", bits=4, value_bytes=2 if multiplies_bf16 or has_gpu else 4)
    device = "gpu" if has_gpu else "cpu"
    needed = estimate(shape or ModelShape(), tuning, _LEAST_BATCH, _LEAST_PLAN, device).host_bytes
    swap = psutil.swap_memory().total
    what = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB are free, swap {swap / _GIB:.1f} GiB"
    smallest = f"the smallest run (LoRA on an int4 base) takes about {needed / _GIB:.1f}"
    if free >= needed:
        yield ok("memory", f"{what}; {smallest}")
    else:
        tell = problem if total + swap < needed else warning
        yield tell(
            "memory",
            f"{what}, and {smallest}",
            code="X105",
            remedy="End other programs, add swap or take another machine; see `chatglm-tuning estimate`",
        )
    if _SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(_SHARED_MEMORY).total
        if size < _LEAST_SHARED_BYTES:
            yield warning(
                "shared memory",
                f"/dev/shm has {size / 2**20:.0f} MiB, which several processes or GPUs may use up",
                code="X105",
                remedy="Start the container with --shm-size=8g",
            )
        else:
            yield ok("shared memory", f"/dev/shm has {size / _GIB:.1f} GiB")


def _cgroup_limit() -> int | None:
    """Return the bytes that a container may use, None where it may use all."""
    if not _CGROUP_LIMIT.is_file():
        return None
    said = _CGROUP_LIMIT.read_text(encoding="ascii").strip()
    return int(said) if said.isdecimal() else None


def limit_findings() -> Iterator[Finding]:
    """Yield limits of the shell that are known to end runs."""
    if resource is None:
        return
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _LEAST_OPEN_FILES:
        yield warning(
            "open files",
            f"this shell allows {files}, which servers and data workers may use up",
            code="X105",
            remedy="Raise it: ulimit -n 65536",
        )
    else:
        yield ok("open files", "no limit" if files == resource.RLIM_INFINITY else f"{files} allowed")
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        yield warning(
            "address space",
            f"this shell allows {space / _GIB:.1f} GiB; weights are mapped into memory and need their whole size of it",
            code="X105",
            remedy="Lift it: ulimit -v unlimited",
        )
