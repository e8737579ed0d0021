"""What a run leaves to look at: a log line at every logging step, and a picture of the loss."""

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatglm_tuning.errors import UserError
from chatglm_tuning.training.interruption import StopOnRequest

logger = logging.getLogger(__name__)

LOG_NAME = "trainer_log.jsonl"
PICTURE_NAME = "loss.png"
_POINTS_OF_A_MEAN = 20
"""The moving mean is over one point in so many of the run."""
_LEAST_POINTS_FOR_A_MEAN = 2 * _POINTS_OF_A_MEAN


class RunLog(TrainerCallback):
    """Appends to `trainer_log.jsonl` at every logging step and draws `loss.png` at every save and at the end.

    rows: of an epoch.
    A line holds step, total_steps, epoch, elapsed_seconds and remaining_seconds of this process, samples_per_second,
    and what Trainer logged (loss, learning_rate, grad_norm, eval_loss). A resumed run keeps the lines up to its step.
    The first step says how long it took to get there. A loss that is not finite ends the run with a UserError.
    """

    def __init__(self, output_dir: Path, rows: int) -> None:
        self._folder = output_dir
        self._rows = rows
        self._start = 0.0
        self._first_step = 0
        self._first_epoch = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the lines that lie ahead of the step the run starts from."""
        self._start = time.monotonic()
        self._first_step = state.global_step
        self._first_epoch = state.epoch or 0.0
        if state.is_world_process_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_log(self._folder) if line["step"] <= state.global_step]
            text = "".join(json.dumps(line) + "\n" for line in kept if state.global_step > 0)
            (self._folder / LOG_NAME).write_text(text, encoding="utf-8")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say after the first step how long it took to get there."""
        if state.global_step == self._first_step + 1 and state.is_world_process_zero:
            logger.info(
                "the first step is done %.1f s after the start of the program; the step took %.1f s of it",
                time.time() - psutil.Process().create_time(),
                time.monotonic() - self._start,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write one line."""
        logs = logs or {}
        loss = logs.get("loss", logs.get("eval_loss"))
        if loss is None:
            return
        if state.is_world_process_zero:
            self._append(state, logs)
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {state.global_step}",
                code="T101",
                where=str(self._folder),
                remedy="lower --learning_rate, or compute in bfloat16 or float32 (--dtype), and resume from the last "
                "checkpoint",
            )

    def _append(self, state: TrainerState, logs: dict[str, Any]) -> None:
        elapsed = time.monotonic() - self._start
        done = state.global_step - self._first_step
        per_step = elapsed / done if done else 0.0
        seen = self._rows * ((state.epoch or 0.0) - self._first_epoch)
        line = {
            "step": state.global_step,
            "total_steps": state.max_steps,
            "elapsed_seconds": round(elapsed, 2),
            "remaining_seconds": round(per_step * (state.max_steps - state.global_step), 2),
            "samples_per_second": round(seen / elapsed, 3) if done else None,
            **logs,
        }
        with (self._folder / LOG_NAME).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw what there is so far."""
        if state.is_world_process_zero:
            draw_loss(self._folder, best=_kept_best(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the whole run."""
        if state.is_world_process_zero:
            draw_loss(self._folder, best=_kept_best(args, state))


class OwnIntervals(TrainerCallback):
    """Logs, evaluates and saves as often as this run says: Trainer goes on with what stands in the checkpoint."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the intervals of `state`."""
        state.compute_steps(args, state.max_steps)


class EarlyEnd(TrainerCallback):
    """Says why a run that early stopping ended has ended. patience: evaluations in a row without a better one."""

    def __init__(self, patience: int, stopping: StopOnRequest) -> None:
        self._patience = patience
        self._stopping = stopping

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say so where the run ended before its last step."""
        if not control.should_training_stop or state.global_step >= state.max_steps or self._stopping.has_stopped:
            return
        if not state.is_world_process_zero or state.best_metric is None:
            return
        logger.info(
            "ended early at step %d: %s not better than %s",
            state.global_step,
            "1 evaluation was" if self._patience == 1 else f"{self._patience} evaluations in a row were",
            describe_best(args, state),
        )


def describe_best(args: TrainingArguments, state: TrainerState) -> str:
    """Return "rouge-l 12.00 of step 4": the best evaluation, which there must be."""
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    assert state.best_metric is not None
    value = f"{state.best_metric:.4f}" if metric == "loss" else f"{state.best_metric:.2f}"
    # Trainer notes the step only where checkpoints are written.
    return f"{metric} {value}" + ("" if state.best_global_step is None else f" of step {state.best_global_step}")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of `trainer_log.jsonl`; a last line that a kill cut short is left out."""
    path = folder / LOG_NAME
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _kept_best(args: TrainingArguments, state: TrainerState) -> tuple[int, str] | None:
    """Return the step of the best checkpoint, which is kept, and what it is best by; None where none is chosen."""
    if state.best_model_checkpoint is None or state.best_global_step is None or state.best_metric is None:
        return None
    return state.best_global_step, f"best checkpoint: {describe_best(args, state)}"


def draw_loss(folder: Path, *, best: tuple[int, str] | None = None) -> None:
    """Draw `loss.png` from `trainer_log.jsonl`: training loss, its moving mean, and evaluation loss.

    best: a step that is marked, and what to say of it.
    """
    lines = read_log(folder)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluated = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if not train and not evaluated:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        if len(losses) < _LEAST_POINTS_FOR_A_MEAN:  # the mean of few points would hide them
            axes.plot(steps, losses, "o-", color="tab:blue", linewidth=2, markersize=3, label="training loss")
        else:
            axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=1, label="training loss")
            axes.plot(steps, _moving_mean(losses), color="tab:blue", linewidth=2, label="moving mean")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="tab:orange", label="evaluation loss")
    if best is not None:
        axes.axvline(best[0], color="tab:green", linestyle="--", linewidth=1.5, label=best[1])
    axes.set_xlabel("step")
    axes.set_ylabel("loss per label token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / PICTURE_NAME, dpi=120)
    pyplot.close(figure)


def _moving_mean(values: tuple[float, ...]) -> list[float]:
    width = max(len(values) // _POINTS_OF_A_MEAN, 1)
    return [
        sum(values[max(i - width + 1, 0) : i + 1]) / len(values[max(i - width + 1, 0) : i + 1])
        for i in range(len(values))
    ]
