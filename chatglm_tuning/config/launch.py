"""Which process of a launch this one is."""

import os


def is_first_rank() -> bool:
    """Whether this process reports for all: the only one, or rank 0 under torchrun (which sets RANK)."""
    return os.environ.get("RANK", "0") == "0"
