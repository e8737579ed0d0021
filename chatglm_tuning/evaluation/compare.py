"""Scores of several systems on the same prompts, their intervals, and whether two of them differ.

A metric is a sum over prompts divided by a weight over prompts: rows for scores, label tokens for the loss. Intervals
are of the percentile bootstrap over prompts, and those of differences of the paired bootstrap, which gives both
systems the same resampled prompts (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation").
A resample has prompts twice, and so fewer distinct pairs: the interval of distinct-2 is of the delete-one jackknife.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.loss import PromptLosses
from chatglm_tuning.evaluation.metrics import (
    DISTINCT_METRIC,
    EXTRA,
    ROW_METRICS,
    Answered,
    References,
    distinct_share,
    distinct_shares_without_each,
    score_prompt,
)
from chatglm_tuning.optional import require

RESAMPLES = 10_000
CONFIDENCE = 0.95
SEED = 0
LOSS_METRIC = "loss"
"""Mean over label tokens; the one metric of which less is better."""

_HIGHEST = 100.0
"""Of every score but the loss."""
_NORMAL_QUANTILE = 1.959964
_NUMBERS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class AnsweredBy:
    """What has answered. adapter: digest of its tensors, None for the base alone. base: its fingerprint."""

    adapter: str | None
    base: str


@dataclass(frozen=True)
class System:
    """One candidate's answers to all prompts.

    cut: how many of them the length limit ended, and cut_prompts: how many prompts were shortened; None where that is
    not known. losses: None where no model was there. answered_by: None where it is not known.
    """

    name: str
    answers: tuple[Answered, ...]
    cut: int | None = None
    losses: PromptLosses | None = None
    cut_prompts: int | None = None
    answered_by: AnsweredBy | None = None


@dataclass(frozen=True)
class Interval:
    """A value, or a difference, and its interval of 95 %; without one (low and high None) for a single prompt."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def is_zero(self) -> bool:
        """Whether value and interval are 0 exactly: no resample saw a difference."""
        return self.value == self.low == self.high == 0


@dataclass(frozen=True)
class Comparison:
    """systems: by name, every metric. differences: by name, every metric less that of `baseline`.

    prompt_scores: by name and metric, `(prompts,)`.
    """

    systems: Mapping[str, Mapping[str, Interval]]
    baseline: str | None
    differences: Mapping[str, Mapping[str, Interval]]
    prompt_scores: Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class _Summed:
    """What a metric is the ratio of; both `(prompts,)`."""

    sums: np.ndarray
    weights: np.ndarray


def compare(
    systems: Sequence[System],
    references: References,
    baseline: str | None = None,
    *,
    advance: Callable[[int], None] | None = None,
) -> Comparison:
    """Score `systems`, which answered the same prompts, and take each one's differences from `baseline`.

    baseline: the name of one of them, or None for no differences. The loss is compared where all have one.
    advance: is told how many answers more were scored.
    """
    has_losses = all(system.losses is not None for system in systems)
    summed = {system.name: _sum_metrics(system, references, advance, with_loss=has_losses) for system in systems}
    values = _ratios({(name, metric): row for name, rows in summed.items() for metric, row in rows.items()})
    distinct = {system.name: _Distinct.of(system) for system in systems}
    shown = {
        name: {metric: values[name, metric] for metric in rows} | {DISTINCT_METRIC: distinct[name].interval(0)}
        for name, rows in summed.items()
    }
    differences = {}
    if baseline is not None:
        others = [name for name in summed if name != baseline]
        against = summed[baseline]
        gaps = _ratios(
            {
                (name, metric): _Summed(row.sums - against[metric].sums, row.weights)
                for name in others
                for metric, row in summed[name].items()
            }
        )
        differences = {
            name: {metric: gaps[name, metric] for metric in against}
            | {DISTINCT_METRIC: distinct[name].less(distinct[baseline]).interval(-_HIGHEST)}
            for name in others
        }
    scores = {name: {metric: row.sums / row.weights for metric, row in rows.items()} for name, rows in summed.items()}
    return Comparison(shown, baseline, differences, scores)


def is_better(metric: str, change: float) -> bool:
    """Return whether a change of that metric is one to the better."""
    return (change < 0) if metric == LOSS_METRIC else (change > 0)


def align(systems: Sequence[System]) -> list[System]:
    """Return `systems` with the answers of all in the order of the first one's.

    Raises UserError where they did not answer the same prompts, with the same references.
    """
    first = _keys(systems[0])
    aligned = [systems[0]]
    for system in systems[1:]:
        places = {key: index for index, key in enumerate(_keys(system))}
        common = sum(key in places for key in first)
        if not common == len(first) == len(places):
            prompts = "1 prompt with its" if len(first) == 1 else f"{len(first)} prompts with their"
            raise UserError(
                f"{systems[0].name} has {prompts} references, {system.name} has {len(places)}, and "
                f"{common} {'is' if common == 1 else 'are'} the same",
                code="E104",
                remedy="Compare predictions for the same data",
            )
        aligned.append(_reordered(system, [places[key] for key in first]))
    return aligned


def _keys(system: System) -> list[tuple[str, tuple[str, ...], int]]:
    """Name every answer's prompt; one that stands in a file again is another."""
    seen: dict[tuple[str, tuple[str, ...]], int] = {}
    keys = []
    for answered in system.answers:
        key = (answered.prompt, answered.references)
        seen[key] = seen.get(key, 0) + 1
        keys.append((*key, seen[key]))
    return keys


def _reordered(system: System, order: Sequence[int]) -> System:
    losses = system.losses
    if losses is not None:
        losses = PromptLosses(losses.sums[order], losses.tokens[order])
    return replace(system, answers=tuple(system.answers[index] for index in order), losses=losses)


def _sum_metrics(
    system: System, references: References, advance: Callable[[int], None] | None, *, with_loss: bool
) -> dict[str, _Summed]:
    scored = []
    for answered in system.answers:
        scored.append(score_prompt(answered, references))
        if advance is not None:
            advance(1)
    rows = np.asarray([count for _, count in scored], dtype=float)
    metrics = {}
    if with_loss and system.losses is not None:
        metrics[LOSS_METRIC] = _Summed(system.losses.sums, system.losses.tokens.astype(float))
    for name in ROW_METRICS:
        metrics[name] = _Summed(np.asarray([scores[name] for scores, _ in scored]), rows)
    return metrics


def _ratios(summed: Mapping[Any, _Summed]) -> dict[Any, Interval]:
    """Return every ratio with its interval; all of them see the same resamples."""
    if not summed:
        return {}
    sums = np.stack([row.sums for row in summed.values()])  # (metrics, prompts)
    weights = np.stack([row.weights for row in summed.values()])
    values = sums.sum(-1) / weights.sum(-1)
    if sums.shape[1] < 2:
        return {key: Interval(float(value)) for key, value in zip(summed, values, strict=True)}
    found = (
        require("scipy.stats", EXTRA)
        .bootstrap(
            (sums, weights),
            _ratio,
            paired=True,
            vectorized=True,
            axis=-1,
            n_resamples=RESAMPLES,
            batch=max(1, _NUMBERS_AT_ONCE // sums.size),
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(SEED),
        )
        .confidence_interval
    )
    return {
        key: Interval(float(value), float(low), float(high))
        for key, value, low, high in zip(summed, values, found.low, found.high, strict=True)
    }


def _ratio(sums: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    return sums.sum(axis) / weights.sum(axis)


@dataclass(frozen=True)
class _Distinct:
    """distinct-2, or a difference of two, and what it is without each prompt."""

    value: float
    without_each: np.ndarray

    @classmethod
    def of(cls, system: System) -> "_Distinct":
        predictions = [answered.prediction for answered in system.answers]
        return cls(distinct_share(predictions), distinct_shares_without_each(predictions))

    def less(self, other: "_Distinct") -> "_Distinct":
        return _Distinct(self.value - other.value, self.without_each - other.without_each)

    def interval(self, lowest: float) -> Interval:
        """The jackknife's interval is symmetric, and would leave the values there can be: it ends with them."""
        count = len(self.without_each)
        if count < 2:
            return Interval(self.value)
        spread = self.without_each - self.without_each.mean()
        width = _NORMAL_QUANTILE * float(np.sqrt((count - 1) / count * (spread**2).sum()))
        return Interval(self.value, max(self.value - width, lowest), min(self.value + width, _HIGHEST))
