"""Libraries and programs that are broken in the ways of real ones."""

from pathlib import Path

# What a broken torch does at its import, and what is said of it.
BROKEN: dict[str, tuple[str, str]] = {
    "ImportError": ("raise ImportError('undefined symbol: iJIT_NotifyEvent')\n", "ImportError: undefined symbol"),
    "OSError": (
        "raise OSError('libcudart.so.12: cannot open shared object file: No such file or directory')\n",
        "OSError: libcudart.so.12: cannot open",
    ),
    "segfault": (
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
        "it ended the process with SIGSEGV",
    ),
    "hang": ("import time\ntime.sleep(600)\n", "it was not done after 6 seconds"),
    "exit": ("import os\nos._exit(7)\n", "it ended the process with exit code 7"),
}


def fake_library(folder: Path, name: str, body: str) -> Path:
    """Write a module of that name; returns the folder, for PYTHONPATH."""
    (folder / f"{name}.py").write_text(body, encoding="utf-8")
    return folder


def fake_program(folder: Path, name: str, body: str) -> Path:
    """Write a shell script of that name; returns the folder, for PATH."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return folder
