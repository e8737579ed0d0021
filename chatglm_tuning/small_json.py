"""JSON files that say what a folder holds: small, and not to be trusted."""

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20
"""More than the state of a very long run; an index or a configuration has some kilobytes."""

# Libraries read some of these files again, from a stack of any depth: what is left of it must do for them.
_MOST_LEVELS = 100


def read_small_json(path: Path) -> Any:
    """Return what the JSON file `path` holds.

    Raises OSError, and ValueError for what is no JSON in UTF-8, is nested too deeply or is larger than `MOST_BYTES`.
    """
    with path.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
    try:
        content = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _is_deeper(content, _MOST_LEVELS):
        raise ValueError("it is nested too deeply")
    return content


def _is_deeper(content: Any, levels: int) -> bool:
    """Whether a value in `content` stands in more than `levels` lists and objects, one in the other."""
    inner = [content]
    for _ in range(levels + 1):
        inner = [
            child
            for item in inner
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(inner)
