"""The picture of the lengths: how many tokens prompts and answers have, and where the limits cut."""

import io

from chatglm_tuning.audit.check import DataReport
from chatglm_tuning.audit.report import bins_of


def draw_lengths(report: DataReport) -> bytes:
    """Return both histograms of what is trained on as a PNG; there must be an example."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths, verdict = report.trained.lengths, report.lengths
    assert lengths is not None
    assert verdict is not None
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    sides = (
        (panels[0], "a prompt", lengths.prompts, "max_input_length"),
        (panels[1], "an answer", lengths.answers, "max_output_length"),
    )
    lines = (
        (verdict.given, "as given", "C3"),
        (verdict.seldom, "cuts 1 % at most", "C1"),
        (verdict.never, "cuts none", "C2"),
    )
    for axes, name, values, limit in sides:
        counts, edges = bins_of(values, 60)
        axes.stairs(counts, edges, fill=True, color="C0")
        for limits, label, colour in lines:
            place = getattr(limits, limit)
            axes.axvline(place, color=colour, linestyle="--", label=f"{place}: {label}")
        axes.set_xlim(0, 1.1 * values.max())  # a limit far beyond all of them stands in the legend alone
        axes.set_title(f"tokens of {name}, and {limit}")
        axes.set_xlabel("tokens, special ones included")
        axes.set_ylabel("examples")
        axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.trained.examples.examples} examples")
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    pyplot.close(figure)
    return content.getvalue()
