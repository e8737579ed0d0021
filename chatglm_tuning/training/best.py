"""Which checkpoint of a run is the best, by what the run has logged and by what stands in its own folders."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerState, TrainingArguments

from chatglm_tuning.checkpoint import read_checkpoint, step_of_checkpoint
from chatglm_tuning.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """Where the checkpoints of a run stand: up to the step that it goes on from in `before`, later in `own`."""

    own: Path
    before: Path | None = None
    until_step: int = 0

    def whole(self, step: int) -> Path | None:
        """Return the checkpoint of that step, None where it is not there or damaged."""
        folder = self.before if self.before is not None and step <= self.until_step else self.own
        checkpoint = folder / f"checkpoint-{step}"
        try:
            return None if read_checkpoint(checkpoint) is None else checkpoint
        except UserError as error:
            logger.warning("%s: %s", error.where, error.what)
            return None


def choose_best(state: TrainerState, places: Places, arguments: TrainingArguments) -> Path | None:
    """Return the best checkpoint of a run, None where it has none; `state` then names it.

    Where the best one is not whole, it is the best of the others that are, and that is said. Of the path that `state`
    has been read with only the step is taken: the folder may have been copied or moved, and another run written there.
    """
    if state.best_model_checkpoint is None:
        return None
    name = Path(state.best_model_checkpoint).name
    step = step_of_checkpoint(Path(name))
    best = None if step is None else places.whole(step)
    if best is None:
        best = _best_of_the_others(state, places, arguments)
        instead = "none of the others" if best is None else best
        logger.warning("the best checkpoint (%s) is not there or not whole: %s is taken in its place", name, instead)
    state.best_model_checkpoint = None if best is None else str(best)
    return best


def _best_of_the_others(state: TrainerState, places: Places, arguments: TrainingArguments) -> Path | None:
    metric = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    values = {int(line["step"]): line[f"eval_{metric}"] for line in state.log_history if f"eval_{metric}" in line}
    finite = [step for step, value in values.items() if math.isfinite(value)]
    for step in sorted(finite, key=values.__getitem__, reverse=bool(arguments.greater_is_better)):
        if (checkpoint := places.whole(step)) is not None:
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
