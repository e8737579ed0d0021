"""Which process of a launch this one is, and of how many."""

import os


def is_first_rank() -> bool:
    """Whether this process reports for all: the only one, or rank 0 under torchrun (which sets RANK)."""
    return os.environ.get("RANK", "0") == "0"


def is_first_on_machine() -> bool:
    """Whether this process tells what is wrong on its machine; another one may lack a file that this one has."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def process_count() -> int:
    """Return the processes of this launch, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))
