"""What a process of several says when another one is gone."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import distributed

from chatglm_tuning.checkpoint import whole_checkpoints
from chatglm_tuning.config.launch import is_first_on_machine, process_count
from chatglm_tuning.errors import UserError

logger = logging.getLogger(__name__)

_TOLD_BY = ("gloo/transport", "NCCL", "Connection closed by peer", "Connection reset by peer")


@contextmanager
def told_lost_processes(output_dir: Path) -> Iterator[None]:
    """Turn the error that a lost process causes in the others into a UserError that names what there is to go on from.

    Which process was lost, and how, torchrun says in the end ("Root Cause").
    """
    try:
        yield
    except RuntimeError as error:
        if process_count() == 1 or not _is_of_a_lost_process(error):
            raise
        whole = next(whole_checkpoints(output_dir), None)
        lost = UserError(
            "another process of this run, or the network to it, was lost",
            code="X110",
            where=str(output_dir),
            remedy="torchrun names it as the root cause; "
            + (
                "no checkpoint was written yet"
                if whole is None
                else f"{whole.name} is whole, nothing before it is lost"
            )
            + ". With --max_restarts and --resume_from_checkpoint auto a run goes on by itself",
        )
        if not is_first_on_machine():  # which tells it anyway, unless it is the one that was lost
            logger.error("%s", lost)
        raise lost from error


def _is_of_a_lost_process(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or any(mark in str(error) for mark in _TOLD_BY)
