"""The tables of scores and differences, and the lines after them, as `eval` prints them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from chatglm_tuning.config.evaluate import PICTURE_NAME, SCORES_NAME
from chatglm_tuning.evaluation.compare import LOSS_METRIC, Comparison, Interval, is_better
from chatglm_tuning.evaluation.results import CONVENTIONS, Evaluation, count_rows
from chatglm_tuning.wording import counted

_DECIMALS = {LOSS_METRIC: 4}
_WIDE_COLUMNS = 2


def scores_table(comparisons: Sequence[Comparison]) -> Table:
    """One column a system: every metric with its interval."""
    systems = {name: metrics for comparison in comparisons for name, metrics in comparison.systems.items()}
    table = Table(title="scores, with intervals of 95 %")
    table.add_column("metric")
    for name in systems:
        table.add_column(escape(name), justify="right", overflow="fold")
    between = _between(systems)
    for metric in _metrics(systems):
        cells = (metrics.get(metric) for metrics in systems.values())
        table.add_row(metric, *("" if cell is None else _shown(metric, cell, between) for cell in cells))
    return table


def differences_table(comparison: Comparison) -> Table:
    """One column a system but the baseline: how far it is from that, and whether the difference is real."""
    table = Table(title=f"differences from {escape(comparison.baseline or '')}, with intervals of 95 %")
    table.add_column("metric")
    for name in comparison.differences:
        table.add_column(escape(name), justify="right", overflow="fold")
        table.add_column("real?", overflow="fold")
    between = _between(comparison.differences)
    for metric in _metrics(comparison.differences):
        cells: list[str] = []
        for gaps in comparison.differences.values():
            cells += [_shown(metric, gaps[metric], between, sign="+"), _verdict(metric, gaps[metric])]
        table.add_row(metric, *cells)
    return table


def closing_lines(found: Evaluation, folder: Path | None) -> Iterator[str]:
    """Say how many rows every system has, what was cut, which convention holds, and which files are in `folder`."""
    for system in found.systems:
        rows = counted(count_rows(system, found.references), "row")
        parts = [f"{system.name}: {rows} of {counted(len(system.answers), 'prompt')}"]
        if system.cut_prompts:
            of = f"{counted(len(system.answers), 'prompt')} {'was' if system.cut_prompts == 1 else 'were'}"
            parts.append(f"{system.cut_prompts} of {of} cut to max_input_length")
        if system.cut:
            were = "was" if system.cut == 1 else "were"
            parts.append(f"{counted(system.cut, 'answer')} {were} cut off by max_output_length")
        yield "; ".join(parts)
    yield f"references {found.references}: {CONVENTIONS[found.references]}"
    if folder is None:
        return
    yield f"scores: {folder / SCORES_NAME}"
    if found.has_picture:
        key = [f"{label} is {name}" for name, label in found.picture_labels.items() if label != name]
        named = f" ({'; '.join(key)})" if key else ""
        yield f"picture: {folder / PICTURE_NAME}{named}"


def _metrics(systems: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    return list(dict.fromkeys(metric for metrics in systems.values() for metric in metrics))


def _between(systems: Mapping[str, Any]) -> str:
    """Return what stands between a value and its interval: many columns are kept narrow."""
    return " " if len(systems) <= _WIDE_COLUMNS else "\n"


def _shown(metric: str, interval: Interval, between: str, sign: str = "") -> str:
    form = f"{sign}.{_DECIMALS.get(metric, 2)}f"
    if interval.low is None or interval.high is None:
        return f"{interval.value:{form}}"
    return f"{interval.value:{form}}{between}({interval.low:{form}} … {interval.high:{form}})"


def _verdict(metric: str, gap: Interval) -> str:
    if gap.low is None:
        return "one prompt says nothing"
    if not gap.is_real:
        return "no: equal" if gap.is_zero else "no: may be chance"
    return "yes: better" if is_better(metric, gap.value) else "yes: worse"
