"""What both training commands do with their flags."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Literal

from chatglm_tuning.cli.log import log_to_stderr
from chatglm_tuning.config.launch import is_first_rank
from chatglm_tuning.config.parsing import parse_train_arguments
from chatglm_tuning.wording import BEFORE_START

logger = logging.getLogger(__name__)


def run_training(script: Literal["lora", "ptuning"], argv: Sequence[str]) -> int:
    """Parse `argv`, train, and print where the result is; returns the exit code."""
    log_to_stderr(logging.INFO if is_first_rank() else logging.ERROR)
    with _leaving_at_sigterm():
        run = parse_train_arguments(script, argv)

        from chatglm_tuning.training.run import train

        result = train(run)
    if is_first_rank() and result.is_interrupted:
        print(f"{result.output_dir}: interrupted")
    elif is_first_rank():
        shown = {name: round(value, 4) for name, value in result.metrics.items() if name in _SHOWN}
        print(f"{result.output_dir}: {shown}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _leave_without_destructors()
    return 0


@contextmanager
def _leaving_at_sigterm() -> Iterator[None]:
    """End this process well at SIGTERM (in the main thread), until training takes it itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _leave_before_start)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave_before_start(_number: int, _frame: FrameType | None) -> None:
    logger.warning(BEFORE_START)
    logging.shutdown()
    os._exit(0)  # an exception could be taken for an import that failed


def _leave_without_destructors() -> None:
    """End this process of several at once; everything is written by now, and all of them have waited for that.

    torch 2.13's gloo group either aborts a process whose interpreter shuts down under its thread, or hangs: its
    destructor joins that thread while it holds the GIL that the thread waits for.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


_SHOWN = ("train_loss", "eval_loss", "train_runtime", "train_samples_per_second")
