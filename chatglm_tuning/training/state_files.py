"""What Trainer reads of a checkpoint beside the weights, looked at before the base is loaded.

A state is tried: put into a stand-in of what Trainer puts it into, which must then work.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import safe_globals

from chatglm_tuning.errors import UserError
from chatglm_tuning.shards import load_plain
from chatglm_tuning.small_json import read_small_json
from chatglm_tuning.training.optimizer_state import check_kinds

_GROUPS = ("decayed", "not decayed")
"""Of parameters, as Trainer makes them."""
_CALLBACKS: dict[str, type[ExportableState]] = {
    "EarlyStoppingCallback": EarlyStoppingCallback,
    "TrainerControl": TrainerControl,
}
_COUNTS = ("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen")
_AMOUNTS = ("epoch", "total_flos", "logging_steps", "eval_steps", "save_steps")
_ANY_OF: dict[str, type | tuple[type, ...]] = {
    "train_batch_size": int,
    "best_global_step": int,
    "best_metric": (int, float),
    "best_model_checkpoint": str,
    "trial_name": str,
    "trial_params": dict,
}
"""Kinds of what may also be null."""


def check_state_files(checkpoint: Path) -> None:
    """Raise UserError where a state in `checkpoint` is damaged, a pickle of more than plain values, or of another kind.

    training_args.bin is never read. What is memory-mapped is read only where it is short.
    """
    checks: dict[str, Callable[[Any], None]] = {
        "optimizer.pt": check_kinds,
        "optimizer.bin": check_kinds,
        SCHEDULER_NAME: _check_is_dictionary,
        "scaler.pt": _try_scaler,
        "rng_state*.pth": _try_random_states,
    }
    for pattern, check in checks.items():
        for file in sorted(checkpoint.glob(pattern)):
            with told_state(file):
                check(read_state(file))
    with told_state(checkpoint / TRAINER_STATE_NAME):
        _try_trainer_state(read_small_json(checkpoint / TRAINER_STATE_NAME))


def check_schedule(file: Path, schedule: Any) -> None:
    """Raise UserError where `schedule`, a stand-in, cannot go on from the state in `file`."""
    with told_state(file):
        schedule.load_state_dict(read_state(file))
        schedule.optimizer.step()
        # What follows an evaluation is stepped with its metric.
        schedule.step(*([1.0] if "metrics" in signature(schedule.step).parameters else []))
        if len(schedule.state_dict().get("base_lrs", _GROUPS)) != len(_GROUPS):
            raise ValueError("it is of another number of groups")


def make_schedule(arguments: TrainingArguments) -> Any:
    """Return a stand-in of the schedule of a run."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in _GROUPS]
    settings: Any = arguments.lr_scheduler_kwargs or {}
    return get_scheduler(
        arguments.lr_scheduler_type,
        torch.optim.SGD(groups, lr=arguments.learning_rate),
        num_warmup_steps=1,
        num_training_steps=2,
        scheduler_specific_kwargs=dict(settings),
    )


def read_state(file: Path) -> Any:
    """Return what a state file holds, on the CPU; raises UserError for what is damaged or no plain values."""
    with safe_globals():
        return load_plain(file)


@contextmanager
def told_state(file: Path) -> Iterator[None]:
    """Turn whatever a state of another kind leads to into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a stand-in raises whatever values of other kinds lead it to
        raise UserError(
            "this is no state of a training run",
            code="C112",
            where=str(file),
            remedy="Give an earlier checkpoint",
        ) from error


def _check_is_dictionary(state: Any) -> None:
    if not isinstance(state, dict):
        raise TypeError("no dictionary")


def _try_scaler(state: Any) -> None:
    torch.amp.GradScaler("cpu").load_state_dict(state)
    if not all(isinstance(value, int | float) for value in state.values()):
        raise TypeError("a value is no number")


def _try_random_states(state: Any) -> None:
    random.Random().setstate(state["python"])
    np.random.RandomState().set_state(state["numpy"])
    torch.Generator().set_state(state["cpu"])


def _try_trainer_state(content: Any) -> None:
    if "global_step" not in content:
        raise KeyError("global_step")
    state = TrainerState(**content)
    for name in (*_COUNTS, *_AMOUNTS):
        value = getattr(state, name)
        if not (_is_number(value) and value >= 0 and (isinstance(value, int) or name in _AMOUNTS)):
            raise TypeError(f"{name} is no count")
    for name, kind in _ANY_OF.items():
        if not (getattr(state, name) is None or isinstance(getattr(state, name), kind)):
            raise TypeError(f"{name} is of another kind")
    for line in state.log_history:
        values = [value for name, value in line.items() if name == "step" or name.startswith("eval_")]
        if not isinstance(line["step"], int) or not all(map(_is_number, values)):
            raise TypeError("a line of the log holds no number")
    for name, given in content.get("stateful_callbacks", {}).items():
        for one in given if isinstance(given, list) else [given]:
            _try_callback(name, one)


def _try_callback(name: str, state: Any) -> None:
    if not isinstance(state["args"], dict) or not isinstance(state["attributes"], dict):
        raise TypeError(f"{name} has no arguments and attributes")
    if name not in _CALLBACKS:
        return
    made: Any = _CALLBACKS[name](**state["args"])
    for attribute, value in state["attributes"].items():
        if type(getattr(made, attribute)) is not type(value):
            raise TypeError(f"{attribute} is of another kind")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
