"""The recipe of `eval`: what is scored is found and checked, answered where it has to be, scored and written down."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_tuning.config.evaluate import EvalArguments, Operand
from chatglm_tuning.config.predict import AdapterArguments
from chatglm_tuning.data.encode import EncodingSettings
from chatglm_tuning.data.rows import BadRows, check_files, iterate_rows
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.compare import System, align, compare
from chatglm_tuning.evaluation.files import digest_bytes, is_utf8, json_line, write_whole, writing_to
from chatglm_tuning.evaluation.loss import PromptLosses, measure_losses
from chatglm_tuning.evaluation.metrics import EXTRA, Answered, require_metrics
from chatglm_tuning.evaluation.predict import Run, plan_run, predict, read_answered_by
from chatglm_tuning.evaluation.progress import showing_progress
from chatglm_tuning.evaluation.results import Evaluation, MadeOf, digest_identity, refuse_other_results, write_results
from chatglm_tuning.evaluation.task import Models, Task, check_adapter_of, prepare_task
from chatglm_tuning.folder_lock import only_writer
from chatglm_tuning.loading import check_adapter
from chatglm_tuning.optional import require
from chatglm_tuning.wording import counted

logger = logging.getLogger(__name__)

LOSS_NAME = "loss.json"

_SHOWN_PROBLEMS = 5
_NO_REFERENCES = '"references" is empty: there is nothing to score the prediction against'
_AS_PREDICT_WRITES = "Give files as chatglm-tuning predict writes them"
_ANSWER_ANEW = (
    "The data rows of these prompts have no answer: add it or leave them out, and run chatglm-tuning predict again"
)
# What decides the loss; how answers are drawn does not.
_DECIDES_LOSS = (
    "format_version",
    "data",
    "base",
    "quantization_bit",
    "dtype",
    "method",
    "adapter",
    "max_input_length",
    "max_output_length",
)


@dataclass(frozen=True)
class _Candidate:
    """What is scored under a name: predictions that are there, or a run that makes them."""

    name: str
    predictions: Path | None = None
    run: Run | None = None


def evaluate(arguments: EvalArguments, *, show_progress: bool = False) -> Evaluation:
    """Score what `arguments` name and write the files that it asks for.

    Everything that can be refused is, before a model is loaded.
    """
    require_metrics()
    require("scipy.stats", EXTRA)
    task = None if arguments.answers is None else prepare_task(arguments.model, arguments.answers)
    candidates = _find_candidates(arguments, task)
    read = {c.name: read_predictions(c.name, c.predictions) for c in candidates if c.predictions is not None}
    if arguments.compare and read:  # answering takes long, and could turn out to be of other data
        asked = [] if task is None else [Answered(p.text, "", p.references) for p in task.prompts]
        align([*([System("--data_path", tuple(asked))] if task is not None else []), *read.values()])
    folder = arguments.output_dir
    if folder is None:
        return _score(arguments, task, candidates, read, show_progress=show_progress)
    made_of = MadeOf(arguments.references, arguments.baseline, {c.name: _digest(c) for c in candidates})
    with ExitStack() as stack:
        with writing_to(folder):
            stack.enter_context(only_writer(folder))
        if not arguments.overwrite:
            refuse_other_results(folder, made_of)
        found = _score(arguments, task, candidates, read, show_progress=show_progress)
        write_results(found, folder, made_of)
    return found


def _digest(candidate: _Candidate) -> str:
    if candidate.run is not None:
        return digest_identity(candidate.run.identity)
    assert candidate.predictions is not None
    return digest_bytes(candidate.predictions.read_bytes())


def _score(
    arguments: EvalArguments,
    task: Task | None,
    candidates: Sequence[_Candidate],
    read: Mapping[str, System],
    *,
    show_progress: bool,
) -> Evaluation:
    """Let the candidates that are not in `read` answer, and score all. read: predictions that were there, by name."""
    models = None if task is None else Models(task, show_progress=show_progress)
    # All of them before the first one answers, which may take hours.
    for candidate in candidates:
        if models is not None and candidate.run is not None:
            models.warn_of_base(candidate.run.adapter)
    systems = []
    for candidate in candidates:
        if candidate.run is None:
            systems.append(read[candidate.name])
        else:
            assert models is not None
            systems.append(_answer(candidate.name, candidate.run, models, show_progress=show_progress))
    if arguments.predictions:
        groups = [[system] for system in systems]
    else:
        systems = align(systems)
        groups = [systems]
    total = sum(len(system.answers) for system in systems)
    showing = showing_progress("scoring", "answers", total) if show_progress else nullcontext(None)
    with showing as advance:
        comparisons = [compare(group, arguments.references, arguments.baseline, advance=advance) for group in groups]
    names = () if arguments.answers is None else tuple(path.name for path in arguments.answers.data_path)
    return Evaluation(tuple(comparisons), tuple(systems), arguments.references, names)


def read_predictions(name: str, path: Path) -> System:
    """Read a file of predictions; raises UserError with every line that is none."""
    check_files([path])
    bad_rows, answers, reasons, without_references = BadRows(), [], [], 0
    for line, row in iterate_rows(path, bad_rows):
        problem = _problem(row)
        if problem is not None:
            bad_rows.add(f"{path}:{line}", problem)
            without_references += problem == _NO_REFERENCES
            continue
        answers.append(Answered(row["prompt"], row["prediction"], tuple(row["references"])))
        reasons.append(row.get("finish_reason"))
    if bad_rows.count:
        raise UserError(
            "\n".join([*bad_rows.shown[:_SHOWN_PROBLEMS], f"{counted(bad_rows.count, 'bad row')} in all"]),
            code="E103",
            remedy=_ANSWER_ANEW if without_references == bad_rows.count else _AS_PREDICT_WRITES,
        )
    cut = None if None in reasons else reasons.count("length")
    return System(name, tuple(answers), cut=cut, answered_by=read_answered_by(path))


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "the row is no object"
    for key in ("prompt", "prediction"):
        if not isinstance(row.get(key), str):
            return f'"{key}" is missing, or no string'
    references = row.get("references")
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        return '"references" is missing, or no list of strings'
    if not references:
        return _NO_REFERENCES
    for key in ("prompt", "prediction"):
        if not is_utf8(row[key]):
            return f'"{key}" is not valid UTF-8 text'
    return None if all(map(is_utf8, references)) else '"references" is not valid UTF-8 text'


def _find_candidates(arguments: EvalArguments, task: Task | None) -> list[_Candidate]:
    if arguments.predictions:
        return [_Candidate(str(path), predictions=path) for path in arguments.predictions]
    assert arguments.output_dir is not None
    if arguments.compare:
        return [_candidate_of(operand, task, arguments) for operand in arguments.compare]
    assert task is not None
    check_adapter_of(task, arguments.adapter)
    name = "base" if arguments.adapter is None else arguments.adapter.folder.resolve().name
    run = plan_run(task, arguments.adapter, arguments.output_dir, overwrite=arguments.overwrite)
    return [_Candidate(name, run=run)]


def _candidate_of(operand: Operand, task: Task | None, arguments: EvalArguments) -> _Candidate:
    if operand.predictions is not None:
        return _Candidate(operand.name, predictions=operand.predictions)
    assert task is not None
    assert arguments.output_dir is not None
    adapter = None
    if operand.adapter is not None:
        adapter = AdapterArguments(operand.adapter, check_adapter(operand.adapter, task.config))
    folder = arguments.output_dir / operand.folder
    return _Candidate(operand.name, run=plan_run(task, adapter, folder, overwrite=arguments.overwrite))


def _answer(name: str, run: Run, models: Models, *, show_progress: bool) -> System:
    """Let a candidate answer, as far as it has not yet, and measure its loss on the references."""
    system = read_predictions(name, predict(run, models))
    identity = {key: run.identity[key] for key in _DECIDES_LOSS}
    losses = _read_losses(run.folder / LOSS_NAME, identity, len(run.task.prompts))
    if losses is None:
        losses = _measure_losses(name, run, models, show_progress=show_progress)
        content = {"run": identity, "sums": losses.sums.tolist(), "tokens": losses.tokens.tolist()}
        with writing_to(run.folder):
            write_whole(run.folder / LOSS_NAME, json_line(content))
    return replace(system, losses=losses, cut_prompts=run.task.cut_prompts)


def _measure_losses(name: str, run: Run, models: Models, *, show_progress: bool) -> PromptLosses:
    task = run.task
    settings = EncodingSettings(task.arguments.max_input_length, task.arguments.max_output_length)
    try:
        with models.using(run.adapter) as model:
            return measure_losses(
                model, task.tokenizer, task.prompts, settings, task.arguments.batch_size, show_progress=show_progress
            )
    except KeyboardInterrupt:
        logger.warning("interrupted while the loss of %s was measured; the same command goes on with it", name)
        raise


def _read_losses(path: Path, identity: dict[str, Any], prompts: int) -> PromptLosses | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["run"] != identity:
            return None
        losses = PromptLosses(np.asarray(content["sums"], float), np.asarray(content["tokens"], int))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return losses if losses.sums.shape == losses.tokens.shape == (prompts,) else None
