"""Processor, compiler and GPUs, and whether torch can use them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm_tuning.doctor.findings import Finding, ok, problem, warning

_SMI_SECONDS = 30
_CPU_INFO = Path("/proc/cpuinfo")
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
_COMPILERS = ("g++", "clang++")
_FREE_SHARE = 0.5
_GIB = 2**30


def cpu_findings(torch: Mapping[str, Any], cpu_info: Path = _CPU_INFO) -> Iterator[Finding]:
    """Yield what the processor multiplies in, and whether kernels can be compiled. torch: what it said of itself."""
    flags = _cpu_flags(cpu_info)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    multiplies_bf16 = torch.get("multiplies_bf16", any(flag in flags for flag in _BF16_FLAGS))
    if multiplies_bf16:
        kinds = [flag for flag in _BF16_FLAGS if flag in flags]
        yield ok("cpu", f"{cores} cores; computes in bfloat16 ({', '.join(kinds) or 'as torch says'})")
    else:
        yield ok("cpu", f"{cores} cores; computes in float32, since it does not multiply bfloat16")
    if flags and "avx" in flags and "avx2" not in flags:
        yield warning(
            "cpu", "it has no AVX2: everything will be very slow", code="X105", remedy="Use another machine, or a GPU"
        )
    compiler = os.environ.get("CXX") or next((name for name in _COMPILERS if shutil.which(name)), None)
    if compiler is None or shutil.which(compiler) is None:
        yield warning(
            "compiler",
            f"there is no C++ compiler ({', '.join(_COMPILERS)}): kernels run uncompiled, and slower",
            code="X101",
            remedy="Install g++ with the system's package manager",
        )
    else:
        yield ok("compiler", f"{compiler}")


def _cpu_flags(cpu_info: Path) -> set[str]:
    if not cpu_info.is_file():
        return set()
    text = cpu_info.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver tells it. capability: (major, minor)."""

    name: str
    free_bytes: int
    total_bytes: int
    capability: tuple[int, int] | None


@dataclass(frozen=True)
class Driver:
    """What nvidia-smi says. cuda: the newest CUDA that the driver runs; failure: why it said nothing."""

    version: str = ""
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    failure: str | None = None


def gpu_findings(torch: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the GPUs of the driver, and whether torch uses them. torch: what it said of itself, empty where broken."""
    driver = read_driver()
    if driver is None:
        there = [gpu["name"] for gpu in torch.get("gpus", ())]
        yield ok("gpu", f"{', '.join(there)}, as torch says" if there else "no NVIDIA driver; runs take the CPU")
        return
    if driver.failure is not None:
        yield problem(
            "gpu",
            f"nvidia-smi fails ({driver.failure})",
            code="X104",
            remedy="Restart the machine, or install the driver again; in a container, start it with --gpus all",
        )
        return
    for gpu in driver.gpus:
        yield from _memory_findings(gpu)
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        yield warning(
            "gpu",
            f"CUDA_VISIBLE_DEVICES={hidden!r} hides all of them",
            code="X104",
            remedy="Unset it, or give the numbers of those to use",
        )
    elif torch and driver.gpus:
        yield from _torch_findings(torch, driver)


def _memory_findings(gpu: Gpu) -> Iterator[Finding]:
    what = f"{gpu.name}, {gpu.free_bytes / _GIB:.1f} of {gpu.total_bytes / _GIB:.1f} GiB free"
    if gpu.free_bytes < _FREE_SHARE * gpu.total_bytes:
        yield warning(
            "gpu", f"{what}: another program holds the rest", code="X107", remedy="See nvidia-smi, and end what is idle"
        )
    else:
        yield ok("gpu", what)


def _torch_findings(torch: Mapping[str, Any], driver: Driver) -> Iterator[Finding]:
    build = torch.get("cuda")
    if build is None and torch.get("hip") is None:
        yield problem(
            "torch",
            f"{torch['version']} is built without CUDA, and there is a GPU ({driver.gpus[0].name})",
            code="X104",
            remedy="Install a build of torch with CUDA; until then everything runs on the CPU",
        )
    elif build and driver.cuda and int(build.split(".")[0]) > driver.cuda[0]:
        yield problem(
            "torch",
            f"{torch['version']} is built for CUDA {build}, and driver {driver.version} runs CUDA "
            f"{driver.cuda[0]}.{driver.cuda[1]} at most",
            code="X104",
            remedy="Update the driver, or install a build of torch for that CUDA",
        )
    elif not torch.get("is_available"):
        reason = torch.get("error", "it says no more")
        yield problem(
            "torch",
            f"{torch['version']} cannot use the GPU ({reason})",
            code="X104",
            remedy="Compare the driver with torch's CUDA build, and look at CUDA_VISIBLE_DEVICES",
        )
    else:
        yield from _kernel_findings(torch)


def _kernel_findings(torch: Mapping[str, Any]) -> Iterator[Finding]:
    architectures = torch.get("architectures", [])
    for gpu in torch.get("gpus", ()):
        capability = tuple(gpu["capability"])
        if architectures and not has_kernels(capability, architectures):
            yield problem(
                "torch",
                f"{torch['version']} has no kernels for {gpu['name']} (compute capability "
                f"{capability[0]}.{capability[1]}; it has {', '.join(architectures)})",
                code="X104",
                remedy="Install a build of torch that has, or set CUDA_VISIBLE_DEVICES= to use the CPU",
            )
        else:
            kind = "bfloat16" if gpu["multiplies_bf16"] else "float16"
            yield ok("torch", f"{torch['version']} (CUDA {torch['cuda']}) uses {gpu['name']} and computes in {kind}")


def has_kernels(capability: tuple[int, ...], architectures: Sequence[str]) -> bool:
    """Whether kernels for these architectures ("sm_80", "compute_90") run on a card of `capability`.

    Binary code runs on cards of its own major version from its minor on; the portable code of compute_X from X on.
    """
    for name in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if found is None:
            continue
        own = (int(found[2]), int(found[3]))
        if own <= capability and (found[1] == "compute" or own[0] == capability[0]):
            return True
    return False


def read_driver() -> Driver | None:
    """Ask nvidia-smi; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "--query-gpu=name,memory.free,memory.total,compute_cap,driver_version"
    listed, failure = _run([program, query, "--format=csv,noheader,nounits"])
    if failure is not None:
        return Driver(failure=failure)
    rows = [[cell.strip() for cell in line.split(",")] for line in listed.splitlines() if line.count(",") == 4]
    overview, _ = _run([program])
    cuda = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", overview)
    return Driver(
        version=rows[0][4] if rows else "",
        cuda=(int(cuda[1]), int(cuda[2])) if cuda else None,
        gpus=tuple(Gpu(name, _bytes(free), _bytes(total), _pair(cap)) for name, free, total, cap, _ in rows),
    )


def _run(command: Sequence[str]) -> tuple[str, str | None]:
    """Return what the program printed, and why that is not to be trusted, None where it is."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SMI_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "", f"it was not done after {_SMI_SECONDS} seconds"
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip().splitlines()
        return "", said[0] if said else f"exit code {done.returncode}"
    return done.stdout, None


def _bytes(mebibytes: str) -> int:
    return int(float(mebibytes) * 2**20) if mebibytes.replace(".", "").isdecimal() else 0


def _pair(capability: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return (int(found[1]), int(found[2])) if found else None
