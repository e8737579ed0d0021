"""Which checkpoint of a run is the best, by what the run has logged and by what stands in its own folders."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from chatglm_tuning.checkpoint import read_checkpoint, read_manifest, step_of_checkpoint
from chatglm_tuning.errors import UserError
from chatglm_tuning.small_json import read_small_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """Where the checkpoints of a run stand: up to the step that it goes on from in `before`, later in `own`.

    verifies_files: whether one whose files are not those of its manifest counts as absent.
    """

    own: Path
    before: Path | None = None
    until_step: int = 0
    verifies_files: bool = True

    def going_on_from(self, checkpoint: Path, step: int) -> "Places":
        """Return the places of the same run once it goes on from a checkpoint, of its own or of another folder."""
        is_own = checkpoint.parent.resolve() == self.own.resolve()  # written as rotation writes it
        return replace(self, before=None if is_own else checkpoint.parent, until_step=step)

    def find(self, recorded: Path, log_history: list[dict[str, float]]) -> Path | None:
        """Return the checkpoint of a step, None where it is not there or damaged.

        recorded: where it was. It is looked for in the folders of the run, which may have been copied or moved; where
        it was, only if it is still one of this run, by its log: another run may have been written there since.
        """
        step = step_of_checkpoint(recorded)
        if step is None:
            return None
        folder = self.before if self.before is not None and step <= self.until_step else self.own
        found = self._whole(folder / recorded.name)
        return found or (self._whole(recorded) if _is_of_run(recorded, log_history) else None)

    def _whole(self, checkpoint: Path) -> Path | None:
        try:
            manifest = (
                read_checkpoint(checkpoint) if self.verifies_files else read_manifest(checkpoint, verify_files=False)
            )
        except UserError as error:
            logger.warning("%s: %s", error.where, error.what)
            return None
        return None if manifest is None else checkpoint


def _is_of_run(checkpoint: Path, log_history: list[dict[str, float]]) -> bool:
    """Whether what a checkpoint's run had logged is how `log_history` begins."""
    try:
        logged = read_small_json(checkpoint / TRAINER_STATE_NAME)["log_history"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return isinstance(logged, list) and logged == log_history[: len(logged)]


def choose_best(state: TrainerState, places: Places, arguments: TrainingArguments) -> Path | None:
    """Return the best checkpoint of a run, None where it has none; `state` then names it.

    Where the best one is not whole, it is the best of the others that are, and that is said.
    """
    if state.best_model_checkpoint is None:
        return None
    recorded = Path(state.best_model_checkpoint)
    best = places.find(recorded, state.log_history)
    if best is None:
        best = _best_of_the_others(state, places, arguments)
        instead = "none of the others" if best is None else best
        logger.warning(
            "the best checkpoint (%s) is not there or not whole: %s is taken in its place", recorded.name, instead
        )
    state.best_model_checkpoint = None if best is None else str(best)
    return best


def _best_of_the_others(state: TrainerState, places: Places, arguments: TrainingArguments) -> Path | None:
    metric = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    values = {int(line["step"]): line[f"eval_{metric}"] for line in state.log_history if f"eval_{metric}" in line}
    finite = [step for step, value in values.items() if math.isfinite(value)]
    for step in sorted(finite, key=values.__getitem__, reverse=bool(arguments.greater_is_better)):
        if (checkpoint := places.find(places.own / f"checkpoint-{step}", state.log_history)) is not None:
            state.best_global_step, state.best_metric = step, values[step]
            return checkpoint
    state.best_global_step = state.best_metric = None
    return None


@contextmanager
def untold_absence() -> Iterator[None]:
    """Keep Trainer from saying that a path is ignored of which only the step is taken here."""

    def is_told(record: logging.LogRecord) -> bool:
        return "The best checkpoint" not in record.getMessage()

    told_by = logging.getLogger("transformers.trainer")
    told_by.addFilter(is_told)
    try:
        yield
    finally:
        told_by.removeFilter(is_told)
