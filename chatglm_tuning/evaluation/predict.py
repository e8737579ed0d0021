"""Predictions in a folder: a run that is killed goes on where it was, and ends with the bytes of an undisturbed one.

`.predictions.part.jsonl` holds a line that says which run it is, and one for every finished batch, each on the disk
before the next batch begins. `predictions.jsonl` appears when all are there, and `predictions_meta.json`, with its
digest, makes the result whole.
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import Task as Bar

from chatglm_tuning.config.evaluate import PREDICTIONS_NAME
from chatglm_tuning.config.predict import AdapterArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.answers import Answer, answer_batch, plan_batches
from chatglm_tuning.evaluation.files import digest_text, json_line, json_text, write_whole, writing_to
from chatglm_tuning.evaluation.task import Models, Task, identify

logger = logging.getLogger(__name__)

META_NAME = "predictions_meta.json"
PART_NAME = ".predictions.part.jsonl"

_SECONDS_BETWEEN_LINES = 30.0
_WHAT_DIFFERS = {"data": "other data", "base": "another base", "adapter": "another adapter"}


@dataclass(frozen=True)
class Run:
    """Predictions that are to stand in `folder`.

    identity: everything that decides them. is_whole: they stand there already.
    done: the answers of the first batches, as an earlier run left them; part_bytes: of the lines that hold them.
    """

    task: Task
    adapter: AdapterArguments | None
    folder: Path
    identity: dict[str, Any]
    batches: list[list[int]]
    is_whole: bool = False
    done: list[list[Answer]] = field(default_factory=list)
    part_bytes: int = 0

    @property
    def path(self) -> Path:
        """The file of the predictions."""
        return self.folder / PREDICTIONS_NAME


def plan_run(task: Task, adapter: AdapterArguments | None, folder: Path, *, overwrite: bool) -> Run:
    """Find what an earlier run has left in `folder`; writes nothing.

    Raises UserError where it is another run's, unless it may be overwritten.
    """
    identity = identify(task, adapter)
    batches = plan_batches([len(ids) for ids in task.prompt_ids], task.arguments.batch_size)
    fresh = Run(task, adapter, folder, identity, batches)
    if overwrite:
        return fresh
    meta = _read_json(folder / META_NAME)
    is_there = (folder / PREDICTIONS_NAME).exists()
    if meta is not None and is_there:
        _refuse_another(folder, meta.get("run"), identity)
        if digest_text(fresh.path.read_text(encoding="utf-8")) == meta.get("sha256"):
            return Run(task, adapter, folder, identity, batches, is_whole=True)
    header, done, size = _read_part(folder / PART_NAME, batches)
    if header is not None:
        _refuse_another(folder, header, identity)
        return Run(task, adapter, folder, identity, batches, done=done, part_bytes=size)
    if is_there:
        raise _another_run(folder, f"{PREDICTIONS_NAME} is not of this run, or was changed after it")
    return fresh


def predict(run: Run, models: Models) -> Path:
    """Answer what is not answered yet and return the file of the predictions, one line a prompt, in their order.

    Raises UserError where the folder cannot be written, and where the model computes NaN.
    """
    if run.is_whole:
        logger.info("%s: these predictions are there already, whole, and are used as they are", run.path)
        (run.folder / PART_NAME).unlink(missing_ok=True)
        return run.path
    with writing_to(run.folder):
        answers = _answer_the_rest(run, models)
        lines, counts = [], {"stop": 0, "length": 0}
        for prompt, answer in zip(run.task.prompts, answers, strict=True):
            counts[answer.finish_reason] += 1
            lines.append(json_line({"prompt": prompt.text, "references": prompt.references, **asdict(answer)}))
        text = "".join(lines)
        write_whole(run.path, text)
        write_whole(run.folder / META_NAME, json_text(_describe(run, counts) | {"sha256": digest_text(text)}))
        (run.folder / PART_NAME).unlink()
    logger.info("%s: %d prompts, %d answers cut off by max_output_length", run.path, len(lines), counts["length"])
    return run.path


def _describe(run: Run, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "run": run.identity,
        "model_name_or_path": run.task.model.model_name_or_path,
        "adapter_folder": None if run.adapter is None else str(run.adapter.folder),
        "data_files": [path.name for path in run.task.arguments.data_path],
        "prompts": len(run.task.prompts),
        "rows": run.task.rows,
        "finish_reasons": counts,
    }


def _answer_the_rest(run: Run, models: Models) -> list[Answer]:
    """Return the answers of all prompts, in their order; each new batch is on the disk before the next one begins."""
    run.folder.mkdir(parents=True, exist_ok=True)
    part = run.folder / PART_NAME
    if not run.part_bytes:
        for name in (META_NAME, PREDICTIONS_NAME):
            (run.folder / name).unlink(missing_ok=True)
        write_whole(part, json_line({"run": run.identity}))
    else:
        os.truncate(part, run.part_bytes)
    finished = list(run.done)
    if len(finished) < len(run.batches):
        if finished:
            logger.info("%s: going on after %d of %d batches", part, len(finished), len(run.batches))
        task = run.task
        count = sum(len(answers) for answers in finished)
        with models.using(run.adapter) as model, part.open("ab") as stream, _progress(task, count) as advance:
            for number in range(len(finished), len(run.batches)):
                prompts = [task.prompt_ids[index] for index in run.batches[number]]
                answers = answer_batch(model, task.tokenizer, prompts, task.drawing, number)
                line = {"batch": number, "answers": [[answer.prediction, answer.finish_reason] for answer in answers]}
                stream.write(json_line(line).encode())
                stream.flush()
                os.fsync(stream.fileno())
                finished.append(answers)
                advance(len(answers))
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
        elif row.get("batch") == len(done) < len(batches) and len(row["answers"]) == len(batches[len(done)]):
            done.append([Answer(*answer) for answer in row["answers"]])
        else:
            break
        size += len(line)
    return header, done, size


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
    return UserError(what, where=str(folder), remedy="Give another --output_dir, or --overwrite to give them up")


@contextmanager
def _progress(task: Task, done: int) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many prompts more were answered; a bar on a terminal, else a line at times."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _RateColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            bar = progress.add_task("answering", total=len(task.prompts), completed=done)
            yield lambda count: progress.advance(bar, count)
        return
    lines = _ProgressLines(len(task.prompts), done)
    yield lines.advance
    lines.finish()


class _RateColumn(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Bar) -> Any:
        speed = task.finished_speed or task.speed
        return f"{speed:.1f} prompts/s" if speed else ""


class _ProgressLines:
    """Logs how far a run is, at most every half minute."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done, self._first = total, done, done
        self._start = self._said = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            rate = self._rate()
            left = (self._total - self._done) / rate
            logger.info("%d of %d prompts, %.1f a second, %.0f s left", self._done, self._total, rate, left)

    def finish(self) -> None:
        seconds = time.monotonic() - self._start
        logger.info("%d prompts in %.1f s, %.1f a second", self._done - self._first, seconds, self._rate())

    def _rate(self) -> float:
        return (self._done - self._first) / max(time.monotonic() - self._start, 1e-9)
