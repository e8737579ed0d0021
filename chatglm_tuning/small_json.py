"""JSON files that say what a folder holds: small, and not to be trusted."""

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20
"""More than the state of a very long run; an index or a configuration has some kilobytes."""


def read_small_json(path: Path) -> Any:
    """Return what the JSON file `path` holds.

    Raises OSError, and ValueError for what is no JSON in UTF-8, is nested too deeply or is larger than `MOST_BYTES`.
    """
    with path.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
