"""Whether a run can go on from a checkpoint with its engine and its optimizer: found out before the base is read."""

import logging
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import SCHEDULER_NAME

from chatglm_tuning.checkpoint import LORA_CONFIG_FILE, LORA_FILE, Method, read_manifest
from chatglm_tuning.errors import UserError
from chatglm_tuning.training.engines import Engine
from chatglm_tuning.training.optimizer_state import check_values, find_layout, has_layout
from chatglm_tuning.training.start import Start
from chatglm_tuning.training.state_files import check_schedule, make_schedule, read_state, told_state

logger = logging.getLogger(__name__)

OPTIMIZER_FILES: dict[Engine, str] = {"plain": "optimizer.pt", "fsdp": "optimizer.bin"}
_NAMES: dict[Engine, str] = {"plain": "one process or DDP", "fsdp": "FSDP", "deepspeed": "DeepSpeed"}
_NEW_RUN: dict[Method, str] = {
    "lora": f"copy its {LORA_CONFIG_FILE} and {LORA_FILE} into a folder of their own and give that with "
    "--resume_from_checkpoint",
    "ptuning": "give it with --ptuning_checkpoint in place of --resume_from_checkpoint",
    "full": "give it with --model_name_or_path in place of --resume_from_checkpoint",
}
_OTHER_NAMES = {"adamw_8bit": "adamw_bnb_8bit", "ademamix": "ademamix_32bit", "rmsprop_bnb": "rmsprop_bnb_32bit"}
"""Of bitsandbytes' optimizers, as transformers makes them (trainer_optimizer.py, _get_bitsandbytes_optimizer)."""


def check_engine(start: Start, engine: Engine, method: Method) -> None:
    """Raise UserError where another engine has written the checkpoint to go on from: states are in its own form."""
    if start.checkpoint is None:
        return
    written = _engine_of(start.checkpoint)
    if written is None:
        logger.warning("%s holds no state of an optimizer, which starts anew", start.checkpoint)
    elif written != engine:
        raise UserError(
            f"the checkpoint was written under {_NAMES[written]}, and this run is under {_NAMES[engine]}",
            code="C114",
            where=str(start.checkpoint),
            remedy=f"Go on under {_NAMES[written]}, or start a new run from its values: {_NEW_RUN[method]}",
        )


def _engine_of(checkpoint: Path) -> Engine | None:
    """Return which engine has written a checkpoint, None for one without states."""
    for engine, name in OPTIMIZER_FILES.items():
        if (checkpoint / name).is_file():
            return engine
    return "deepspeed" if any(path.is_dir() for path in checkpoint.glob("global_step*")) else None


def check_states(start: Start, engine: Engine, arguments: TrainingArguments, method: Method) -> None:
    """Raise UserError where the optimizer or the schedule of this run cannot take the states of the checkpoint.

    Shapes are compared once the model is there.
    """
    if start.checkpoint is None or engine == "deepspeed":
        return
    manifest = read_manifest(start.checkpoint, verify_files=False)
    before = {} if manifest is None else manifest.settings
    _check_schedule(start.checkpoint, before.get("lr_scheduler_type"), arguments, method)
    file = start.checkpoint / OPTIMIZER_FILES[engine]
    if not file.is_file():
        return
    optimizer, now = before.get("optim"), _plain(arguments.optim)
    layout, state = find_layout(arguments), read_state(file)
    shares_state = optimizer is None or _family(optimizer) == _family(now)
    if not shares_state and (layout is None or not has_layout(state, layout)):
        raise _other("optim", "optimizer", optimizer, now, start.checkpoint, method)
    if layout is not None:
        with told_state(file):
            check_values(state, layout)


def _check_schedule(checkpoint: Path, before: str | None, arguments: TrainingArguments, method: Method) -> None:
    file, now = checkpoint / SCHEDULER_NAME, _plain(arguments.lr_scheduler_type)
    if not file.is_file():
        return
    schedule = make_schedule(arguments)
    # Some take any state without a word, and begin anew.
    if before not in (None, now) and not schedule.state_dict().keys() <= read_state(file).keys():
        raise _other("lr_scheduler_type", "schedule", before, now, checkpoint, method)
    check_schedule(file, schedule)


def _other(flag: str, what: str, before: str | None, now: str, checkpoint: Path, method: Method) -> UserError:
    return UserError(
        f"the checkpoint was written with the {what} {before}, and this run has {now}, which cannot go on from its "
        "state",
        code="C114",
        where=str(checkpoint),
        remedy=f"Give --{flag} {before}, or start a new run from its values: {_NEW_RUN[method]}",
    )


def _family(optimizer: str) -> str:
    """Return the name that optimizers of one state have in common: where its pages lie is not part of it."""
    name = optimizer.removeprefix("paged_")
    return _OTHER_NAMES.get(name, name)


def _plain(name: Any) -> str:
    return str(getattr(name, "value", name))
