"""The tables of scores and differences, as `eval` prints them."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from chatglm_tuning.evaluation.compare import LOSS_METRIC, Comparison, Interval
from chatglm_tuning.evaluation.evaluate import is_better

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
        return "no: may be chance"
    return "yes: better" if is_better(metric, gap.value) else "yes: worse"
