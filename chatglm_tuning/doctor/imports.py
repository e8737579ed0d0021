"""Whether the libraries can be imported, found out in another process: there they may fail, crash or hang."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatglm_tuning.doctor.findings import Finding, ok, problem, warning

TIME_LIMIT_SECONDS = 180
_PROBE = Path(__file__).with_name("import_probe.py")
# What is imported to see whether a library works: of transformers the part that imports most of it.
_MODULES = {
    "numpy": "numpy",
    "torch": "torch",
    "safetensors": "safetensors.torch",
    "sentencepiece": "sentencepiece",
    "pyarrow": "pyarrow",
    "datasets": "datasets",
    "accelerate": "accelerate",
    "transformers": "transformers.trainer",
    "peft": "peft",
}
_NEED_TORCH = ("safetensors", "accelerate", "transformers", "peft")


@dataclass
class Imports:
    """What became of each library. seconds: of those that were imported; errors: of the others."""

    seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    torch: Mapping[str, Any] = field(default_factory=dict)
    openmp: Sequence[str] = ()


def import_libraries(time_limit_s: float = TIME_LIMIT_SECONDS) -> Imports:
    """Import all libraries; one that ends its process, or is not done in time, does not keep the others from theirs.

    Those that import torch are left out where it fails.
    """
    result, waiting = Imports(), list(_MODULES)
    while waiting:
        lines, ending = _run_probe([_MODULES[name] for name in waiting], time_limit_s)
        culprit = _take(lines, result)
        if culprit is None:
            break
        result.errors[culprit] = ending
        waiting = waiting[waiting.index(culprit) + 1 :]
        if "torch" in result.errors:
            waiting = [name for name in waiting if name not in _NEED_TORCH]
    if "torch" in result.errors:
        for name in _NEED_TORCH:  # their failure is torch's
            result.errors.pop(name, None)
    return result


def _run_probe(modules: Sequence[str], time_limit_s: float) -> tuple[list[dict[str, Any]], str]:
    """Return what the probe told, and how it ended where it did not come to its end."""
    command = [sys.executable, "-P", str(_PROBE), *modules]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=time_limit_s, check=False
        )
        output, ending = done.stdout, _ending(done.returncode)
    except subprocess.TimeoutExpired as error:
        told = error.stdout or b""
        output = told.decode(errors="replace") if isinstance(told, bytes) else told
        ending = f"it was not done after {time_limit_s:g} seconds"
    return [json.loads(line) for line in output.splitlines()], ending


def _ending(return_code: int) -> str:
    if return_code < 0:
        return f"it ended the process with {signal.Signals(-return_code).name}"
    return f"it ended the process with exit code {return_code}"


def _take(lines: Sequence[Mapping[str, Any]], result: Imports) -> str | None:
    """Add what a probe told to `result`; returns the library that it did not come back from."""
    names = {module: name for name, module in _MODULES.items()}
    open_one = None
    for line in lines:
        if "starts" in line:
            open_one = names[line["starts"]]
        elif "failed" in line:
            result.errors[names[line["failed"]]] = line["error"]
            open_one = None
        elif "imported" in line:
            result.seconds[names[line["imported"]]] = line["seconds"]
            result.torch = line["facts"] or result.torch
            open_one = None
        else:
            result.openmp = line["openmp"]
    return open_one


def findings_of(imports: Imports, wanted: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what the imports show. wanted: the requirement on each library, as "torch>=2.11"."""
    for name, error in imports.errors.items():
        if error.startswith("ModuleNotFoundError") and f"'{name}'" in error:
            continue  # told with the versions
        yield problem(
            name,
            f"it cannot be imported ({error})",
            code="X102",
            remedy=f'Install it again, best into a fresh environment: pip install --force-reinstall "'
            f'{wanted.get(name, name)}"',
        )
    if "torch" in imports.errors:
        yield warning(
            "imports",
            f"{', '.join(_NEED_TORCH)} were not tried, since they need torch",
            code="X102",
            remedy="Mend torch and run this again",
        )
    if imports.seconds:
        yield ok("imports", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in imports.seconds.items()))
    if imports.torch.get("numpy") is False or "umpy" in imports.torch.get("error", ""):
        yield problem(
            "numpy",
            f"torch {imports.torch['version']} cannot use the numpy that is installed",
            code="X106",
            remedy="Install torch and numpy together: pip install -c constraints.txt torch numpy",
        )
    yield from _openmp_findings(imports.openmp)


def _openmp_findings(libraries: Sequence[str]) -> Iterator[Finding]:
    kinds = {Path(path).name.split(".")[0].split("-")[0] for path in libraries}
    if len(kinds) > 1:
        yield warning(
            "OpenMP",
            f"one process loads several runtimes: {', '.join(libraries)}",
            code="X106",
            remedy="Do not mix libraries of conda and pip in one environment; they may hang or slow each other",
        )
