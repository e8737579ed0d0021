"""Imports libraries one after another and tells of each what became of it. Run as a script, in a process of its own.

The parent reads a JSON object a line: one before each import, so that it knows which one ended the process, and one
after it. Nothing but the standard library is imported before.
"""

import contextlib
import json
import os
import sys
import time
from importlib import import_module
from typing import Any, TextIO

_OPENMP = ("libgomp", "libiomp5", "libomp")


def main(modules: list[str]) -> None:
    """Import `modules` in their order. What they print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        os.dup2(2, 1)
        for name in modules:
            _tell(stream, {"starts": name})
            start = time.monotonic()
            try:
                module = import_module(name)
            except BaseException as error:  # SystemExit too: some libraries end the process
                _tell(stream, {"failed": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
                continue
            facts = _torch_facts(module) if name == "torch" else {}
            _tell(stream, {"imported": name, "seconds": time.monotonic() - start, "facts": facts})
        _tell(stream, {"openmp": _openmp_libraries()})


def _tell(stream: TextIO, content: dict[str, Any]) -> None:
    stream.write(json.dumps(content) + "\n")
    stream.flush()


def _torch_facts(torch: Any) -> dict[str, Any]:
    """Return what torch says of its build and devices; "error" where it does not get so far."""
    facts: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    try:
        facts["multiplies_bf16"] = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        facts["numpy"] = torch.zeros(2).numpy().tolist() == [0.0, 0.0]
        facts["is_available"] = torch.cuda.is_available()
        facts["architectures"] = torch.cuda.get_arch_list()
        facts["gpus"] = [_gpu_facts(torch, index) for index in range(torch.cuda.device_count())]
        if facts["cuda"] and not facts["is_available"]:
            torch.cuda.init()  # raises with the reason
    except Exception as error:
        facts["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return facts


def _gpu_facts(torch: Any, index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "bytes": properties.total_memory,
        "multiplies_bf16": properties.major >= 8,
    }


def _openmp_libraries() -> list[str]:
    """Return the paths of the OpenMP runtimes in this process; none where the system does not tell."""
    found = set()
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            if os.path.basename(path).startswith(_OPENMP):
                found.add(path)
    return sorted(found)


if __name__ == "__main__":
    main(sys.argv[1:])
