"""The scores of a model card: those that `eval` wrote, else the last that training measured."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatglm_tuning.checkpoint import Manifest
from chatglm_tuning.config.arguments import GENERATION_METRICS
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.compare import AnsweredBy
from chatglm_tuning.evaluation.metrics import DISTINCT_METRIC
from chatglm_tuning.evaluation.results import ANSWERED_BY

logger = logging.getLogger(__name__)

SCORES_NAME = "scores.json"
_LOG_NAME = "trainer_log.jsonl"
_MOST_SCORES = 40
_REFERENCES = ("each", "best")
_REMEDY = "Give the scores.json of chatglm-tuning eval"
_REMEDY_NOT_SAID = (
    "Run chatglm-tuning eval with this adapter and --data_path; or, where chatglm-tuning predict gave the answers, run "
    "that again, which keeps them, then the same eval"
)


@dataclass(frozen=True)
class Scores:
    """Names and values, and a line that says what they are of; both empty where there are none."""

    rows: tuple[tuple[str, str], ...] = ()
    about: str = ""


def read_scores(given: Path | None, adapter: Path, manifest: Manifest | None, wanted: AnsweredBy) -> Scores:
    """Return the scores in the given file, else in the adapter's scores.json, else in its training's log.

    wanted: the adapter and the base whose scores they must be. A scores.json in the adapter's folder that has none of
    them is passed over with a warning.
    Raises UserError where a scores.json is missing or is not as `eval` writes it, and where that given is of others.
    """
    path = given or adapter / SCORES_NAME
    if given is None and not path.is_file():
        return _of_training(adapter, manifest)
    content = _read(path)
    try:
        if content["references"] not in _REFERENCES or not content["systems"]:
            raise ValueError("another file")
        problem = _why_of_others(content["systems"], wanted)
        if problem is None:
            systems = _of_these(content["systems"], wanted)
            return Scores(tuple(_scores(systems))[:_MOST_SCORES], _about(content, systems))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            "the scores are not as eval writes them", code="E105", where=str(path), remedy=_REMEDY
        ) from error
    what, remedy = problem
    if given is not None:
        raise UserError(what, code="E105", where=str(path), remedy=remedy)
    logger.warning("%s: %s. They are not put into the model card. %s", path, what, remedy)
    return _of_training(adapter, manifest)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"the scores cannot be read ({error.strerror})", code="E105", where=str(path), remedy=_REMEDY
        ) from error
    except ValueError as error:
        raise UserError("the scores are no JSON", code="E105", where=str(path), remedy=_REMEDY) from error
    if not isinstance(content, dict):
        raise UserError("the scores are no JSON object", code="E105", where=str(path), remedy=_REMEDY)
    return content


def _why_of_others(systems: Mapping[str, Any], wanted: AnsweredBy) -> tuple[str, str] | None:
    """Return what is wrong with scores among which none is of the adapter on the base, and the remedy."""
    found = [facts.get(ANSWERED_BY) for facts in systems.values()]
    if asdict(wanted) in found:
        return None
    if not any(found):
        return "it does not say which adapter and base the scores are of", _REMEDY_NOT_SAID
    if any(one and one["adapter"] == wanted.adapter for one in found):
        return "the scores are of this adapter on another base model", "Run chatglm-tuning eval on this base"
    return (
        f"the scores are of {', '.join(systems)}, and none of this adapter as it is now",
        "Run chatglm-tuning eval --overwrite with this adapter",
    )


def _of_these(systems: Mapping[str, Any], wanted: AnsweredBy) -> dict[str, Any]:
    """Return the scores of the adapter on the base, and those of the base alone beside them."""
    kept = (asdict(wanted), asdict(AnsweredBy(None, wanted.base)))
    return {name: facts for name, facts in systems.items() if facts.get(ANSWERED_BY) in kept}


def _scores(systems: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the scores of every system, with their intervals."""
    for system, facts in systems.items():
        for metric, found in facts["metrics"].items():
            interval = f" [{found['low']:.4g}, {found['high']:.4g}]" if _has_interval(found) else ""
            yield f"{system}: {metric}", f"{found['value']:.4g}{interval}"
        yield f"{system}: prompts", str(facts["prompts"])


def _has_interval(found: Mapping[str, Any]) -> bool:
    return found.get("low") is not None and found.get("high") is not None


def _about(content: Mapping[str, Any], systems: Mapping[str, Any]) -> str:
    """Say of what data the scores are, how references were counted, and what the intervals are."""
    parts = [f"References: `{content['references']}`"]
    if content.get("convention"):
        parts[0] += f" ({content['convention']})"
    metrics = {name for facts in systems.values() for name, found in facts["metrics"].items() if _has_interval(found)}
    if content.get("confidence") and metrics:
        kinds = ["bootstrap over the prompts"] if metrics - {DISTINCT_METRIC} else []
        if DISTINCT_METRIC in metrics:
            kinds.append(f"of {DISTINCT_METRIC} the jackknife")
        parts.append(f"Intervals of {100 * float(content['confidence']):g} % ({'; '.join(kinds)})")
    names = _data_names(content.get("data_files"))
    if names:
        parts.insert(0, f"Data: {', '.join(names)}")
    return ". ".join(parts) + "."


def _data_names(data: Any) -> list[str]:
    """Return the names of files that are given as names, paths, or objects with a name."""
    entries = data if isinstance(data, list) else [data] if data else []
    found = [entry.get("name") if isinstance(entry, Mapping) else entry for entry in entries]
    return [Path(name).name for name in found if isinstance(name, str)]


def _of_training(adapter: Path, manifest: Manifest | None) -> Scores:
    """Return the last evaluation in the log of the training: that of the values which the folder holds."""
    try:
        lines = (adapter / _LOG_NAME).read_text(encoding="utf-8").splitlines()
    except OSError:
        return Scores()
    last: Mapping[str, Any] = {}
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:  # cut short by a kill
            break
        if isinstance(line, dict) and "eval_loss" in line:
            last = line
    names = [name for name in ("loss", *GENERATION_METRICS) if isinstance(last.get(f"eval_{name}"), int | float)]
    if not names:
        return Scores()
    files = _data_names(None if manifest is None else manifest.settings.get("eval_files"))
    data = f"Data: {', '.join(files)}. " if files else ""
    answered = " (scores of answers: of a sample)" if len(names) > 1 else ""
    about = f"{data}Measured by training at its last evaluation{answered}; loss is that of a label token."
    return Scores(tuple((name, f"{last[f'eval_{name}']:.4g}") for name in names), about)
