"""The picture of a comparison: a panel for each metric, a bar for each system, its interval on it."""

from pathlib import Path

from chatglm_tuning.evaluation.compare import LOSS_METRIC, Comparison, Interval

_PANELS_IN_A_ROW = 4
_TITLES = {
    LOSS_METRIC: "loss per token\n(less is better)",
    "rouge-1": "ROUGE-1",
    "rouge-2": "ROUGE-2",
    "rouge-l": "ROUGE-L",
    "bleu-4": "BLEU-4",
    "chrf": "chrF",
    "distinct-2": "distinct-2",
}


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw every metric of every system, with intervals, into `path`, a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(comparison.systems)
    labels = [_label(name, number) for number, name in enumerate(names, start=1)]
    metrics = list(comparison.systems[names[0]])
    rows = -(-len(metrics) // _PANELS_IN_A_ROW)
    size = (3.2 * min(len(metrics), _PANELS_IN_A_ROW), 3.2 * rows + 0.4)
    figure, panels = pyplot.subplots(rows, _PANELS_IN_A_ROW, figsize=size, layout="constrained", squeeze=False)
    for metric, axes in zip(metrics, panels.flat, strict=False):
        intervals = [comparison.systems[name][metric] for name in names]
        for number, interval in enumerate(intervals):
            axes.bar(number, interval.value, width=0.7, color=f"C{number}", yerr=_error(interval), capsize=5)
            top = interval.value if interval.high is None else interval.high
            axes.annotate(f"{interval.value:.2f}", (number, top), (0, 3), textcoords="offset points", ha="center")
        axes.set_title(_TITLES.get(metric, metric), fontsize="medium")
        axes.set_xticks(range(len(names)), labels, rotation=20, ha="right", fontsize="small")
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    for axes in list(panels.flat)[len(metrics) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _error(interval: Interval) -> list[list[float]] | None:
    if interval.low is None or interval.high is None:
        return None
    return [[interval.value - interval.low], [interval.high - interval.value]]


def _label(name: str, number: int) -> str:
    """The fonts that come with matplotlib have no Chinese; such a name is shown by its place."""
    if not name.isascii():
        return f"system {number}"
    return name if len(name) <= 18 else f"…{name[-17:]}"
