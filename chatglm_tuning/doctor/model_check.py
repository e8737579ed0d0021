"""The whole check of a model's folder, as commands make it, in another process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from chatglm_tuning.doctor.findings import Finding, ok, problem

_TIME_LIMIT_SECONDS = 300
_MODULE = "chatglm_tuning.doctor.whole_check"
_SOURCES = Path(__file__).parents[2]


def command_findings(given: str) -> Iterator[Finding]:
    """Yield what the commands would say of the folder."""
    command = [sys.executable, "-P", "-m", _MODULE, str(Path(given).expanduser())]
    search = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(_SOURCES)]))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIME_LIMIT_SECONDS,
            check=False,
            env={**os.environ, "PYTHONPATH": search},
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        yield _failed(f"it was not done after {_TIME_LIMIT_SECONDS} seconds")
        return
    except ValueError:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        yield _failed(last[0])
        return
    if found:
        yield problem("folder", found["what"], code=found["code"], remedy=found["remedy"])
    else:
        yield ok(
            "folder",
            "commands take it: configuration, tokenizer, weight files and tensors pass their checks",
        )


def _failed(reason: str) -> Finding:
    return problem(
        "folder",
        f"the check that commands make ended with an error ({reason})",
        code="X102",
        remedy="Mend what is told above; if nothing is, report this",
    )
