"""SIGTERM, as machines that may be taken away send it: the run saves a checkpoint and ends well."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class StoppedBeforeStart(BaseException):
    """The run was told to end before its first step; there is nothing to save."""


class Interruption:
    """Takes SIGTERM while it is entered (in the main thread; in another it does nothing).

    Before `begin_steps`, StoppedBeforeStart is raised where the program stands; afterwards the request is kept for the
    end of the step.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._is_stepping = False
        self._previous: Any = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def begin_steps(self) -> None:
        """From here on a request waits for the end of the step."""
        self._is_stepping = True

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        self.is_requested = True
        if not self._is_stepping:
            raise StoppedBeforeStart
        logger.warning("SIGTERM: the run ends after this step, with a checkpoint")


class StopOnRequest(TrainerCallback):
    """Saves and ends the run after the step in which any of its processes was told to end."""

    def __init__(self, interruption: Interruption) -> None:
        self._interruption = interruption
        self.has_stopped = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask Trainer to save and to stop, in all processes after the same step."""
        if self._is_any_told(args) and state.global_step < state.max_steps:
            self.has_stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def _is_any_told(self, args: TrainingArguments) -> bool:
        told = self._interruption.is_requested
        if args.world_size == 1:
            return told
        flag = torch.tensor(float(told), device=args.device)
        distributed.all_reduce(flag)
        return float(flag) > 0
