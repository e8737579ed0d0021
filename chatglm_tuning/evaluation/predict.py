"""Predictions in a folder: a run that is killed goes on where it was, and ends with the bytes of an undisturbed one.

`.predictions.part.jsonl` holds a line that says which run it is, and one for every finished batch, each on the disk
before the next batch begins. `predictions.jsonl` appears when all are there, and `predictions_meta.json`, with its
digest, makes the result whole.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from chatglm_tuning.config.evaluate import PREDICTIONS_NAME
from chatglm_tuning.config.predict import AdapterArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.answers import Answer, FinishReason, answer_batch, plan_batches
from chatglm_tuning.evaluation.compare import AnsweredBy
from chatglm_tuning.evaluation.files import digest_bytes, is_utf8, json_line, json_text, write_whole, writing_to
from chatglm_tuning.evaluation.progress import showing_progress
from chatglm_tuning.evaluation.results import ANSWERED_BY
from chatglm_tuning.evaluation.task import Models, Task, identify
from chatglm_tuning.folder_lock import only_writer
from chatglm_tuning.wording import counted

logger = logging.getLogger(__name__)

META_NAME = "predictions_meta.json"
PART_NAME = ".predictions.part.jsonl"

_WHAT_DIFFERS = {"data": "other data", "base": "another base", "adapter": "another adapter"}


@dataclass(frozen=True)
class Run:
    """Predictions that are to stand in `folder`.

    identity: everything that decides them. is_whole: they stand there already.
    done: the answers of the first batches, as an earlier run left them; part_bytes: of the lines that hold them.
    overwrite: whether what another run has left may be given up.
    """

    task: Task
    adapter: AdapterArguments | None
    folder: Path
    identity: dict[str, Any]
    batches: list[list[int]]
    is_whole: bool = False
    done: list[list[Answer]] = field(default_factory=list)
    part_bytes: int = 0
    overwrite: bool = False

    @property
    def path(self) -> Path:
        """The file of the predictions."""
        return self.folder / PREDICTIONS_NAME


def plan_run(task: Task, adapter: AdapterArguments | None, folder: Path, *, overwrite: bool) -> Run:
    """Find what an earlier run has left in `folder`; writes nothing.

    Raises UserError where it is another run's, unless it may be overwritten; this run's own is used either way.
    """
    batches = plan_batches([len(ids) for ids in task.prompt_ids], task.arguments.batch_size)
    fresh = Run(task, adapter, folder, identify(task, adapter), batches, overwrite=overwrite)
    try:
        return _continued(fresh)
    except UserError:
        if overwrite:
            return fresh
        raise


def _continued(fresh: Run) -> Run:
    """Return `fresh` with what its folder holds of it; raises UserError where that is another run's."""
    meta = _read_json(fresh.folder / META_NAME)
    is_there = fresh.path.exists()
    if meta is not None and is_there:
        _refuse_another(fresh.folder, meta.get("run"), fresh.identity)
        if fresh.path.is_file() and digest_bytes(fresh.path.read_bytes()) == meta.get("sha256"):
            return replace(fresh, is_whole=True)
    header, done, size = _read_part(fresh.folder / PART_NAME, fresh.batches)
    if header is not None:
        _refuse_another(fresh.folder, header, fresh.identity)
        return replace(fresh, done=done, part_bytes=size)
    if is_there:
        raise _another_run(fresh.folder, f"{PREDICTIONS_NAME} is not of this run, or was changed after it")
    return fresh


def predict(run: Run, models: Models) -> Path:
    """Answer what is not answered yet and return the file of the predictions, one line a prompt, in their order.

    Raises UserError where the folder cannot be written or another process is writing there, and where the model
    computes NaN.
    """
    with writing_to(run.folder), only_writer(run.folder):
        # Another process may have been at work here since.
        return _predict(plan_run(run.task, run.adapter, run.folder, overwrite=run.overwrite), models)


def _predict(run: Run, models: Models) -> Path:
    models.warn_of_base(run.adapter)
    if run.is_whole:
        logger.info("%s: these predictions are there already, whole, and are used as they are", run.path)
        (run.folder / PART_NAME).unlink(missing_ok=True)
        _complete_meta(run, models)
        return run.path
    finished = list(run.done)
    try:
        _answer_the_rest(run, models, finished)
    except KeyboardInterrupt:
        logger.warning(
            "interrupted after %d of %s; the same command goes on",
            sum(map(len, finished)),
            counted(len(run.task.prompts), "prompt"),
        )
        raise
    lines, counts = [], {"stop": 0, "length": 0}
    for prompt, answer in zip(run.task.prompts, _in_order(run, finished), strict=True):
        counts[answer.finish_reason] += 1
        lines.append(json_line({"prompt": prompt.text, "references": prompt.references, **asdict(answer)}))
    content = "".join(lines).encode()
    write_whole(run.path, content)
    write_whole(run.folder / META_NAME, json_text(_describe(run, models, counts) | {"sha256": digest_bytes(content)}))
    (run.folder / PART_NAME).unlink()
    logger.info(
        "%s: %s, %s cut off by max_output_length",
        run.path,
        counted(len(lines), "prompt"),
        counted(counts["length"], "answer"),
    )
    return run.path


def _complete_meta(run: Run, models: Models) -> None:
    """Note what has given the answers, where an earlier version has left them without that."""
    if read_answered_by(run.path) is not None:
        return
    path = run.folder / META_NAME
    meta = _read_json(path)
    assert meta is not None, "else the run were not whole"
    write_whole(path, json_text(meta | {ANSWERED_BY: asdict(models.answered_by(run.adapter))}))
    logger.info("%s: which adapter and base the answers are of is noted in it now", path)


def _describe(run: Run, models: Models, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "run": run.identity,
        "model_name_or_path": run.task.model.model_name_or_path,
        ANSWERED_BY: asdict(models.answered_by(run.adapter)),
        "adapter_folder": None if run.adapter is None else str(run.adapter.folder),
        "data_files": [path.name for path in run.task.arguments.data_path],
        "prompts": len(run.task.prompts),
        "rows": run.task.rows,
        "cut_prompts": run.task.cut_prompts,
        "finish_reasons": counts,
    }


def _answer_the_rest(run: Run, models: Models, finished: list[list[Answer]]) -> None:
    """Answer the batches after those `finished`, and add them there; each is on the disk before the next one begins."""
    part = run.folder / PART_NAME
    if not run.part_bytes:
        for name in (META_NAME, PREDICTIONS_NAME):
            (run.folder / name).unlink(missing_ok=True)
        write_whole(part, json_line({"run": run.identity}))
    else:
        os.truncate(part, run.part_bytes)
    if len(finished) == len(run.batches):
        return
    if finished:
        logger.info("%s: going on after %d of %s", part, len(finished), _batches(run))
    task = run.task
    showing = showing_progress("answering", "prompts", len(task.prompts), sum(map(len, finished)))
    with models.using(run.adapter) as model, part.open("ab") as stream, showing as advance:
        for number in range(len(finished), len(run.batches)):
            prompts = [task.prompt_ids[index] for index in run.batches[number]]
            answers = answer_batch(model, task.tokenizer, prompts, task.drawing, number)
            line = {"batch": number, "answers": [[answer.prediction, answer.finish_reason] for answer in answers]}
            stream.write(json_line(line).encode())
            stream.flush()
            os.fsync(stream.fileno())
            finished.append(answers)
            advance(len(answers))


def _batches(run: Run) -> str:
    return f"{len(run.batches)} batch{'' if len(run.batches) == 1 else 'es'}"


def _in_order(run: Run, finished: Sequence[Sequence[Answer]]) -> list[Answer]:
    """Return the answers of all batches in the order of the prompts."""
    by_index = {
        index: answer
        for indices, answers in zip(run.batches, finished, strict=True)
        for index, answer in zip(indices, answers, strict=True)
    }
    return [by_index[index] for index in range(len(by_index))]


def _read_part(path: Path, batches: list[list[int]]) -> tuple[Any, list[list[Answer]], int]:
    """Return the run that a working file is of, its whole batches, and the bytes of the lines that hold them.

    A kill may cut the last line short, and a fall of the power may leave anything behind it.
    """
    content = path.read_bytes() if path.is_file() else b""
    header, done, size = None, [], 0
    for line in content.splitlines(keepends=True):
        row = _decode(line)
        if row is None:
            break
        if header is None:
            if "run" not in row:
                break
            header = row["run"]
        elif row.get("batch") == len(done) < len(batches):
            answers = _read_answers(row.get("answers"), len(batches[len(done)]))
            if answers is None:
                break
            done.append(answers)
        else:
            break
        size += len(line)
    return header, done, size


def _read_answers(found: Any, count: int) -> list[Answer] | None:
    """Return the answers of a batch of that size, or None where `found` is none."""
    if not isinstance(found, list) or len(found) != count:
        return None
    for pair in found:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            return None
        if pair[1] not in get_args(FinishReason) or not is_utf8(pair[0]):
            return None
    return [Answer(*pair) for pair in found]


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_answered_by(predictions: Path) -> AnsweredBy | None:
    """Return what has given the answers in a file, where what `predict` left beside it says so of these bytes."""
    meta = _read_json(predictions.with_name(META_NAME)) or {}
    found = meta.get(ANSWERED_BY)
    if not isinstance(found, dict) or meta.get("sha256") != digest_bytes(predictions.read_bytes()):
        return None
    adapter, base = found.get("adapter"), found.get("base")
    return AnsweredBy(adapter, base) if isinstance(adapter, str | None) and isinstance(base, str) else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _refuse_another(folder: Path, found: Any, identity: dict[str, Any]) -> None:
    found = found if isinstance(found, dict) else {}
    names = [name for name in identity if found.get(name) != identity[name]]
    if not names:
        return
    differences = [
        _WHAT_DIFFERS.get(name, f"{name} was {_shown(found.get(name))} and is now {_shown(identity[name])}")
        for name in names
    ]
    raise _another_run(folder, f"it holds predictions of another run ({'; '.join(differences[:4])})")


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _another_run(folder: Path, what: str) -> UserError:
    return UserError(
        what, code="O105", where=str(folder), remedy="Give another --output_dir, or --overwrite to give them up"
    )
