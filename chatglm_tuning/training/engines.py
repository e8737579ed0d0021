"""Which engine trains, what it cannot do, and whether its processes agree: found out before anything is loaded."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import gather_object

from chatglm_tuning.checkpoint import step_of_checkpoint
from chatglm_tuning.config.arguments import TrainRun
from chatglm_tuning.config.arguments_file import read_arguments_file
from chatglm_tuning.config.launch import process_count
from chatglm_tuning.errors import UserError
from chatglm_tuning.optional import require
from chatglm_tuning.training.start import Start

logger = logging.getLogger(__name__)

Engine = Literal["plain", "fsdp", "deepspeed"]
"""plain: one process, or DDP on several."""

# What shards weights in our way, so that a checkpoint is written and read as it is without an engine.
_FSDP_DEFAULTS: dict[str, Any] = {
    "version": 2,
    "state_dict_type": "FULL_STATE_DICT",
    "transformer_layer_cls_to_wrap": ["ChatGLMBlock"],
    "cpu_ram_efficient_loading": True,
    "activation_checkpointing": False,
}
_FSDP_REMEDIES = {
    "version": "FSDP1 is gone from transformers: leave it out",
    "state_dict_type": "checkpoints here hold whole tensors, so that one process reads them too: leave it out",
    "activation_checkpointing": "leave it out, and say it with --activation_checkpointing",
}


def find_engine(run: TrainRun) -> Engine:
    """Return the engine that the settings of `run` ask for.

    Raises UserError where they ask for two, for what an engine cannot do here, or for one that is not installed.
    """
    warn_of_shared_store()
    values = run.trainer.values
    asked = [name for name, is_asked in _asked_for(run).items() if is_asked]
    if len(asked) > 1:
        raise UserError(
            f"{' and '.join(asked)} are both asked for, and each of them places the weights",
            code="A105",
            remedy="keep one of them",
        )
    if run.options.model_parallel and process_count() > 1:
        raise UserError(
            f"--model_parallel spreads one process over all GPUs, and {process_count()} processes were started",
            code="A105",
            remedy="start it without torchrun, or leave --model_parallel out, so that each process has a GPU",
        )
    if asked == ["fsdp"]:
        _check_fsdp(run, fsdp_settings(values))
        return "fsdp"
    if asked == ["deepspeed"]:
        require("deepspeed", "deepspeed")
        return "deepspeed"
    return "plain"


def _asked_for(run: TrainRun) -> dict[str, bool]:
    values = run.trainer.values
    return {
        "fsdp": bool(values.get("fsdp")),
        "deepspeed": bool(values.get("deepspeed")),
        "model_parallel": run.options.model_parallel,
    }


def fsdp_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `fsdp_config` with what is always so here.

    Raises UserError where it is a file that cannot be read, or asks for something else.
    """
    given = values.get("fsdp_config") or {}
    if isinstance(given, str):
        given = dict(read_arguments_file(Path(given).expanduser()).values)
    given = {name.removeprefix("fsdp_"): value for name, value in given.items()}
    for name, remedy in _FSDP_REMEDIES.items():
        if str(given.get(name, _FSDP_DEFAULTS[name])).lower() != str(_FSDP_DEFAULTS[name]).lower():
            raise UserError(f"fsdp_config has {name} {given[name]}", code="A105", remedy=remedy)
    return _FSDP_DEFAULTS | given


def _check_fsdp(run: TrainRun, settings: Mapping[str, Any]) -> None:
    if process_count() < 2:
        raise UserError(
            "fsdp shares the weights among several processes, and one was started",
            code="A105",
            remedy="start it with torchrun --nproc_per_node=N, or leave fsdp out",
        )
    if run.options.predict_samples:
        raise UserError(
            "predict_samples needs the whole model in each process, which fsdp shares out",
            code="A105",
            remedy="leave it out, and score the checkpoints with chatglm-tuning eval",
        )
    if run.trainer.values.get("auto_find_batch_size"):
        raise UserError(
            "auto_find_batch_size wraps the model anew, which FSDP2 cannot",
            code="A105",
            remedy="give per_device_train_batch_size; chatglm-tuning estimate says what fits",
        )


def warn_of_shared_store() -> None:
    """Say so where torchrun would hand the addresses of lost processes to those that it starts again.

    Its store outlives the workers, and 2.13 uses it for every restart (pytorch/pytorch issue 135712): a restart then
    fails, or hangs, as often as a process is faster than the one whose new address it needs.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        logger.warning(
            "restarts may fail at connecting: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun"
        )


def check_bits(engine: Engine, bits: int | None) -> None:
    """Raise UserError where the engine cannot share out a base that is held in `bits` (None: not quantised)."""
    if bits is not None and engine != "plain":
        raise UserError(
            f"{engine} shares out weights in floating point, and this base is held in int{bits}",
            code="A107",
            remedy=f"leave {engine} out: with DDP each process holds the small base, and only the adapter is exchanged",
        )


def check_same_start(start: Start, output_dir: Path) -> None:
    """Raise UserError in all processes where they have found different checkpoints to start from.

    Called once the processes are connected.
    """
    if process_count() == 1:
        return
    found = gather_object([None if start.checkpoint is None else step_of_checkpoint(start.checkpoint)])
    if len(set(found)) > 1:
        steps = ", ".join("none" if step is None else f"step {step}" for step in found)
        raise UserError(
            f"the processes of this run see different checkpoints (in the order of their ranks: {steps})",
            code="O109",
            where=str(output_dir),
            remedy="give an --output_dir on a disk that all machines share",
        )
