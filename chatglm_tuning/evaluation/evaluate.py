"""The recipe of `eval`: what is scored is found and checked, answered where it has to be, scored and written down."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_tuning.config.evaluate import EvalArguments, Operand
from chatglm_tuning.config.predict import AdapterArguments
from chatglm_tuning.data.encode import EncodingSettings
from chatglm_tuning.data.rows import BadRows, check_files, iterate_rows
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.compare import (
    CONFIDENCE,
    LOSS_METRIC,
    RESAMPLES,
    SEED,
    Comparison,
    System,
    align,
    compare,
)
from chatglm_tuning.evaluation.files import json_line, json_text, write_whole, writing_to
from chatglm_tuning.evaluation.loss import PromptLosses, measure_losses
from chatglm_tuning.evaluation.metrics import EXTRA, Answered, References, require_metrics
from chatglm_tuning.evaluation.picture import draw_comparison
from chatglm_tuning.evaluation.predict import Run, plan_run, predict
from chatglm_tuning.evaluation.task import Models, Task, check_adapter_of, prepare_task
from chatglm_tuning.loading import check_adapter
from chatglm_tuning.optional import require

logger = logging.getLogger(__name__)

SCORES_NAME = "scores.json"
PROMPT_SCORES_NAME = "prompt_scores.jsonl"
PICTURE_NAME = "comparison.png"
LOSS_NAME = "loss.json"

CONVENTIONS: dict[References, str] = {
    "each": "every pair of a prompt and a reference is a row by itself, as the model's authors scored",
    "best": "one row a prompt: ROUGE and chrF of its nearest reference, BLEU-4 against all of them together",
}
_SHOWN_PROBLEMS = 5
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
class Evaluation:
    """What was found: scores of systems that answered the same prompts, or one of these for each of several files."""

    comparisons: tuple[Comparison, ...]
    systems: tuple[System, ...]
    references: References


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
    if task is not None and read:  # answering takes long, and could turn out to be of other data
        asked = System("--data_path", tuple(Answered(p.text, "", p.references) for p in task.prompts))
        align([asked, *read.values()])
    models = None if task is None else Models(task, show_progress=show_progress)
    systems = []
    for candidate in candidates:
        if candidate.run is None:
            systems.append(read[candidate.name])
        else:
            assert models is not None
            systems.append(_answer(candidate.name, candidate.run, models))
    if arguments.predictions:
        comparisons = [compare([system], arguments.references) for system in systems]
    else:
        systems = align(systems)
        comparisons = [compare(systems, arguments.references, arguments.baseline)]
    found = Evaluation(tuple(comparisons), tuple(systems), arguments.references)
    if arguments.output_dir is not None:
        with writing_to(arguments.output_dir):
            _write(found, arguments.output_dir)
    return found


def read_predictions(name: str, path: Path) -> System:
    """Read a file of predictions; raises UserError with every line that is none."""
    check_files([path])
    bad_rows, answers, reasons = BadRows(), [], []
    for line, row in iterate_rows(path, bad_rows):
        problem = _problem(row)
        if problem is not None:
            bad_rows.add(f"{path}:{line}", problem)
            continue
        answers.append(Answered(row["prompt"], row["prediction"], tuple(row["references"])))
        reasons.append(row.get("finish_reason"))
    if bad_rows.count:
        raise UserError(
            "\n".join([*bad_rows.shown[:_SHOWN_PROBLEMS], f"{bad_rows.count} bad rows in all"]),
            remedy="Give files as chatglm-tuning predict writes them",
        )
    return System(name, tuple(answers), cut=None if None in reasons else reasons.count("length"))


def _problem(row: Any) -> str | None:
    if not isinstance(row, dict):
        return "the row is no object"
    for key in ("prompt", "prediction"):
        if not isinstance(row.get(key), str):
            return f'"{key}" is missing, or no string'
    references = row.get("references")
    if not isinstance(references, list) or not references or not all(isinstance(text, str) for text in references):
        return '"references" is missing, or no list of strings'
    return None


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
    folder = arguments.output_dir / operand.name.strip("/.").replace("/", "-")
    return _Candidate(operand.name, run=plan_run(task, adapter, folder, overwrite=arguments.overwrite))


def _answer(name: str, run: Run, models: Models) -> System:
    """Let a candidate answer, as far as it has not yet, and measure its loss on the references."""
    system = read_predictions(name, predict(run, models))
    identity = {key: run.identity[key] for key in _DECIDES_LOSS}
    losses = _read_losses(run.folder / LOSS_NAME, identity)
    if losses is None:
        settings = EncodingSettings(run.task.arguments.max_input_length, run.task.arguments.max_output_length)
        with models.using(run.adapter) as model:
            losses = measure_losses(
                model, run.task.tokenizer, run.task.prompts, settings, run.task.arguments.batch_size
            )
        content = {"run": identity, "sums": losses.sums.tolist(), "tokens": losses.tokens.tolist()}
        with writing_to(run.folder):
            write_whole(run.folder / LOSS_NAME, json_line(content))
    return System(name, system.answers, system.cut, losses)


def _read_losses(path: Path, identity: dict[str, Any]) -> PromptLosses | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["run"] != identity:
            return None
        return PromptLosses(np.asarray(content["sums"]), np.asarray(content["tokens"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(found: Evaluation, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / SCORES_NAME, json_text(describe(found)))
    lines = [
        json_line({"system": system.name, "prompt": answered.prompt, "scores": scores})
        for system, answered, scores in _prompt_scores(found)
    ]
    write_whole(folder / PROMPT_SCORES_NAME, "".join(lines))
    if len(found.comparisons) == 1 and len(found.systems) > 1:
        draw_comparison(found.comparisons[0], folder / PICTURE_NAME)


def _prompt_scores(found: Evaluation) -> list[tuple[System, Answered, dict[str, float]]]:
    scores = {
        name: by_metric for comparison in found.comparisons for name, by_metric in comparison.prompt_scores.items()
    }
    return [
        (system, answered, {metric: round(float(values[index]), 4) for metric, values in scores[system.name].items()})
        for system in found.systems
        for index, answered in enumerate(system.answers)
    ]


def describe(found: Evaluation) -> dict[str, Any]:
    """Return the content of scores.json."""
    first = found.comparisons[0]
    return {
        "references": found.references,
        "convention": CONVENTIONS[found.references],
        "chrf": "the mean of sacrebleu's chrF2 of every row",
        "loss": "the mean over the label tokens of all references; less is better",
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": SEED,
        "systems": {
            system.name: {
                "prompts": len(system.answers),
                "rows": count_rows(system, found.references),
                "cut_answers": system.cut,
                "metrics": {
                    metric: asdict(interval)
                    for comparison in found.comparisons
                    for metric, interval in comparison.systems.get(system.name, {}).items()
                },
            }
            for system in found.systems
        },
        "baseline": first.baseline,
        "differences": {
            name: {metric: asdict(gap) | {"is_real": gap.is_real} for metric, gap in gaps.items()}
            for name, gaps in first.differences.items()
        },
    }


def count_rows(system: System, references: References) -> int:
    """Return how many rows its scores are the mean of."""
    if references == "best":
        return len(system.answers)
    return sum(len(answered.references) for answered in system.answers)


def is_better(metric: str, change: float) -> bool:
    """Return whether a change of that metric is one to the better."""
    return (change < 0) if metric == LOSS_METRIC else (change > 0)
