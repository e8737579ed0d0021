"""What Trainer reads of a checkpoint beside the weights, looked at before the base is loaded."""

from pathlib import Path

from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from chatglm_tuning.errors import UserError
from chatglm_tuning.shards import load_plain
from chatglm_tuning.small_json import read_small_json

_STATE_NAME = "trainer_state.json"
_STATES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")


def check_state_files(checkpoint: Path) -> None:
    """Raise UserError where a state in `checkpoint` is damaged, or a pickle of more than plain values.

    training_args.bin is never read. What is memory-mapped is not read either.
    """
    with safe_globals():
        for file in sorted(found for name in _STATES for found in checkpoint.glob(name)):
            load_plain(file)
    path = checkpoint / _STATE_NAME
    try:
        if not isinstance(read_small_json(path)["global_step"], int):
            raise TypeError("global_step is no whole number")
        TrainerState.load_from_json(str(path))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            "this is no state of a training run",
            code="C112",
            where=str(path),
            remedy="Give an earlier checkpoint",
        ) from error
