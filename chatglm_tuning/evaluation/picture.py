"""The picture of a comparison: a panel for each metric, a bar for each system, its interval on it."""

import io
from collections.abc import Sequence
from typing import Any

from chatglm_tuning.evaluation.compare import LOSS_METRIC, Comparison, Interval

_PANELS_IN_A_ROW = 4
_LONGEST_LABEL = 18
_LONGEST_LINE = 100
_TITLES = {
    LOSS_METRIC: "loss per token\n(less is better)",
    "rouge-1": "ROUGE-1",
    "rouge-2": "ROUGE-2",
    "rouge-l": "ROUGE-L",
    "bleu-4": "BLEU-4",
    "chrf": "chrF",
    "distinct-2": "distinct-2",
}
_LATIN = "DejaVu Sans"  # comes with matplotlib, and has no Chinese
_CHINESE = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Heiti SC",
    "Arial Unicode MS",
    "Noto Sans CJK JP",
    "Droid Sans Fallback",
)


def draw_comparison(comparison: Comparison, subject: str) -> bytes:
    """Return a PNG of every metric of every system, with intervals; a star marks a real difference.

    subject: what was scored, for the title.
    """
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context({"font.family": _fonts(), "text.parse_math": False}):
        return _draw(comparison, subject)


def label_systems(names: Sequence[str]) -> dict[str, str]:
    """Return what the picture calls each system: its name, or for all "system 1" and so on where one has no room.

    There is none for a long name, nor for characters that no font of this machine has. The picture then has a key.
    """
    fonts = _fonts()
    if all(len(name) <= _LONGEST_LABEL and _is_drawable(name, fonts) for name in names):
        return {name: name for name in names}
    return {name: f"system {number}" for number, name in enumerate(names, start=1)}


def _draw(comparison: Comparison, subject: str) -> bytes:
    from matplotlib import pyplot

    names = list(comparison.systems)
    labels = label_systems(names)
    metrics = list(comparison.systems[names[0]])
    rows = -(-len(metrics) // _PANELS_IN_A_ROW)
    key = [] if all(name == label for name, label in labels.items()) else _key(labels)
    size = (3.2 * min(len(metrics), _PANELS_IN_A_ROW), 3.2 * rows + 0.8 + 0.22 * len(key))
    figure, panels = pyplot.subplots(rows, _PANELS_IN_A_ROW, figsize=size, layout="constrained", squeeze=False)
    for metric, axes in zip(metrics, panels.flat, strict=False):
        for number, name in enumerate(names):
            interval = comparison.systems[name][metric]
            axes.bar(number, interval.value, width=0.7, color=f"C{number}", yerr=_error(interval), capsize=5)
            top = interval.value if interval.high is None else interval.high
            star = "*" if _is_real(comparison, name, metric) else ""
            axes.annotate(f"{interval.value:.2f}{star}", (number, top), (0, 3), textcoords="offset points", ha="center")
        axes.set_title(_TITLES.get(metric, metric), fontsize="medium")
        axes.set_xticks(range(len(names)), list(labels.values()), rotation=20, ha="right", fontsize="small")
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    for axes in list(panels.flat)[len(metrics) :]:
        axes.set_axis_off()
    figure.suptitle(_title(comparison, labels, subject), fontsize="medium")
    if key:
        figure.supxlabel("\n".join(key), fontsize="small", x=0.01, ha="left")
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    pyplot.close(figure)
    return content.getvalue()


def _title(comparison: Comparison, labels: dict[str, str], subject: str) -> str:
    fonts = _fonts()
    drawable = "".join(character if _is_drawable(character, fonts) else "?" for character in subject)
    title = f"{_shortened(drawable)}, with intervals of 95 %"
    if comparison.baseline is None:
        return title
    return f"{title}\n* the difference from {labels[comparison.baseline]} is real: its interval leaves out 0"


def _key(labels: dict[str, str]) -> list[str]:
    """Return lines that say which name a label stands for, the end of a name that fills more than one line."""
    fonts = _fonts()
    lines = []
    for name, label in labels.items():
        if not _is_drawable(name, fonts):
            lines.append(f"{label}: no font here has the characters of its name, which is in scores.json")
        else:
            lines.append(f"{label}: {_shortened(name)}")
    return lines


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else f"…{text[1 - _LONGEST_LINE :]}"


def _is_real(comparison: Comparison, name: str, metric: str) -> bool:
    gap = comparison.differences.get(name, {}).get(metric)
    return gap is not None and gap.is_real


def _error(interval: Interval) -> list[list[float]] | None:
    if interval.low is None or interval.high is None:
        return None
    return [[interval.value - interval.low], [interval.high - interval.value]]


def _fonts() -> list[str]:
    """Return the font families to draw with: where one with Chinese is installed, that too."""
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return [_LATIN, *[name for name in _CHINESE if name in installed][:1]]


def _is_drawable(text: str, fonts: Sequence[str]) -> bool:
    from matplotlib.font_manager import findfont, get_font

    found: list[Any] = [get_font(findfont(name)) for name in fonts]
    return all(any(font.get_char_index(ord(character)) for font in found) for character in text)
