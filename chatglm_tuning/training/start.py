"""Where a training run starts from, and the folder it may write to: all that is decided before anything is read."""

import json
import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from chatglm_tuning.checkpoint import (
    MANIFEST_NAME,
    adapter_method,
    read_checkpoint,
    read_manifest,
    step_of_checkpoint,
    whole_checkpoints,
)
from chatglm_tuning.config.arguments import TrainRun
from chatglm_tuning.config.launch import is_first_rank, process_count
from chatglm_tuning.errors import UserError
from chatglm_tuning.training.callbacks import LOG_NAME, PICTURE_NAME
from chatglm_tuning.training.state_files import check_state_files

logger = logging.getLogger(__name__)

AUTO = Path("auto")
"""The --resume_from_checkpoint that takes what there is."""
_NAMES = {"lora": "LoRA", "ptuning": "P-Tuning v2", "full": "full tuning"}


@dataclass(frozen=True)
class Start:
    """Where a run starts from.

    checkpoint: a checkpoint of ours to continue with optimizer, schedule and data order, or None.
    weights: an adapter whose values are the first, or None.
    """

    checkpoint: Path | None = None
    weights: Path | None = None


def find_start(run: TrainRun) -> Start:
    """Resolve --resume_from_checkpoint: a checkpoint, a run's folder (its newest whole one), or only an adapter.

    `auto` is the newest whole checkpoint of output_dir, and a new run where there is none: a machine that starts a run
    again, after whatever ended it, gives the same command as the first time.
    Raises UserError where there is nothing to start from, or it is damaged or of another method.
    """
    given = run.options.resume_from_checkpoint
    if given is None:
        return Start()
    folder = given.expanduser()
    if given == AUTO:
        folder = run.trainer.output_dir
        if run.trainer.values.get("save_strategy") == "no":
            logger.warning("save_strategy is no: there will be no checkpoint to resume from")
        if next(whole_checkpoints(folder), None) is None:
            logger.info("%s holds no whole checkpoint: the run starts anew", folder)
            return Start()
    if not folder.is_dir():
        raise UserError(
            "there is no such folder",
            code="C101",
            where=str(folder),
            remedy="give a checkpoint-N folder or the folder of a run",
        )
    checkpoint = folder if (folder / TRAINER_STATE_NAME).is_file() else next(whole_checkpoints(folder), None)
    if checkpoint is not None:
        manifest = read_checkpoint(checkpoint)
        if manifest is None:
            raise UserError(
                "the checkpoint is not whole: it was being written when its run ended",
                code="C112",
                where=str(checkpoint),
                remedy="give an earlier checkpoint, or the run's folder, whose newest whole checkpoint is then taken",
            )
        if manifest.method != run.method:
            raise UserError(
                f"the checkpoint is of {_NAMES[manifest.method]}, and this run is of {_NAMES[run.method]}",
                code="C103",
                where=str(checkpoint),
                remedy="resume it with the command that it was trained with",
            )
        check_state_files(checkpoint)
        _tell_of_torn(folder, checkpoint)
        logger.info("resuming from %s", checkpoint)
        return Start(checkpoint=checkpoint)
    if adapter_method(folder) != run.method:
        raise UserError(
            f"there is neither a whole checkpoint nor an adapter of {_NAMES[run.method]} in it",
            code="C102",
            where=str(folder),
            remedy="give a checkpoint-N folder, the folder of a run, or an adapter's",
        )
    logger.warning("%s holds an adapter alone: its values are taken, the optimizer starts anew", folder)
    return Start(weights=folder)


def _tell_of_torn(folder: Path, taken: Path) -> None:
    """Say which checkpoints of a run's folder are newer than the one that is taken, and why they are not."""
    newer = (path for path in folder.glob("checkpoint-*") if folder != taken)
    for path in sorted(newer):
        if (step_of_checkpoint(path) or 0) > (step_of_checkpoint(taken) or 0):
            logger.warning("%s is passed over (%s): %s is taken instead", path, _why_torn(path), taken.name)


def _why_torn(checkpoint: Path) -> str:
    try:
        read_checkpoint(checkpoint)
    except UserError as error:
        return f"{error.where}: {error.what}"
    return "it has no manifest: it was being written when its run ended"


def check_steps(run: TrainRun, start: Start) -> bool:
    """Return whether the checkpoint to continue stands at the run's last step, so that only its result is missing.

    The last step is max_steps, or the one at which early stopping ended the run.
    Raises UserError where it stands beyond max_steps: Trainer would train one step more.
    """
    if start.checkpoint is None:
        return False
    state = _trainer_state(start.checkpoint)
    if _has_stopped_early(run, state):
        logger.info("the checkpoint stands where early stopping ended the run: its result is written")
        return True
    last, step = run.trainer.values.get("max_steps", -1), state["global_step"]
    if last <= 0:
        return False
    if step > last:
        raise UserError(
            f"the checkpoint stands at step {step}, and max_steps is {last}",
            code="C113",
            where=str(start.checkpoint),
            remedy="Raise --max_steps, or resume from an earlier checkpoint",
        )
    if step == last:
        logger.info("the checkpoint stands at the last step, %d: nothing is left to train, its result is written", step)
    return step == last


def _has_stopped_early(run: TrainRun, state: dict[str, Any]) -> bool:
    patience = run.options.early_stopping_patience
    if patience is None:
        return False
    stopping = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {}).get("attributes", {})
    return stopping.get("early_stopping_patience_counter", 0) >= patience


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))


def warn_of_other_batches(run: TrainRun, start: Start) -> None:
    """Say that the order of the rows does not go on where a checkpoint was made with another token budget."""
    if start.checkpoint is None:
        return
    manifest = read_manifest(start.checkpoint, verify_files=False)
    settings = {} if manifest is None else manifest.settings
    for name, now in (("max_tokens_per_batch", run.options.max_tokens_per_batch), ("processes", process_count())):
        if settings.get(name) != now:
            logger.warning(
                "the checkpoint was made with %s %s, and this run has %s: some rows come again, and some not at all, "
                "in the epoch it stands in",
                name,
                settings.get(name),
                now,
            )


def check_sources_stay(run: TrainRun, start: Start, base_folder: Path) -> None:
    """Refuse to write a result over the base model, or to give up a checkpoint that holds the base or the data."""
    output_dir = run.trainer.output_dir
    if output_dir.resolve() == base_folder.resolve():
        raise UserError(
            "output_dir is the folder of the base model, which would be overwritten",
            code="O107",
            where=str(output_dir),
            remedy="Give another --output_dir",
        )
    removed = [path.resolve() for path in _given_up(run, start)]
    for source in (base_folder, *run.data.data_path, *run.data.eval_path):
        if any(source.resolve().is_relative_to(path) for path in removed):
            raise UserError(
                f"--overwrite_output_dir would remove what the run reads ({source})",
                code="O107",
                where=str(output_dir),
                remedy="Give another --output_dir",
            )


def check_output_dir(run: TrainRun, start: Start) -> None:
    """Refuse an output folder that holds a result, unless it is continued or may be overwritten."""
    output_dir = run.trainer.output_dir
    given_up = _given_up(run, start)
    if not given_up or run.options.overwrite_output_dir:
        return
    if _is_continued(run, start):
        raise UserError(
            f"output_dir holds a checkpoint after the one to resume from ({given_up[0].name})",
            code="O103",
            where=str(output_dir),
            remedy="Resume from the folder itself, or pass --overwrite_output_dir to give the later ones up",
        )
    raise UserError(
        f"output_dir already holds a result ({given_up[0].name})",
        code="O103",
        where=str(output_dir),
        remedy="Give another --output_dir, continue it with --resume_from_checkpoint, or pass --overwrite_output_dir",
    )


def clear_output_dir(run: TrainRun, start: Start) -> None:
    """Remove the result that --overwrite_output_dir gives up; only once nothing that was given can be refused."""
    if not is_first_rank():
        return
    for path in _given_up(run, start):
        with suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _given_up(run: TrainRun, start: Start) -> list[Path]:
    """What a new result replaces: checkpoints and, unless the run is continued, the files of its manifest and logs."""
    output_dir = run.trainer.output_dir
    if _is_continued(run, start):
        assert start.checkpoint is not None
        step = step_of_checkpoint(start.checkpoint) or 0
        return [path for path in whole_checkpoints(output_dir) if (step_of_checkpoint(path) or 0) > step]
    found = [path for path in output_dir.glob("checkpoint-*") if step_of_checkpoint(path) is not None]
    if (output_dir / MANIFEST_NAME).is_file():
        found.append(output_dir / MANIFEST_NAME)
        manifest = read_manifest(output_dir, verify_files=False)
        assert manifest is not None
        found += [output_dir / name for name in manifest.files]
    if found:
        found += [output_dir / LOG_NAME, output_dir / PICTURE_NAME]
    return found


def _is_continued(run: TrainRun, start: Start) -> bool:
    return start.checkpoint is not None and start.checkpoint.parent.resolve() == run.trainer.output_dir.resolve()
