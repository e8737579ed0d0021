"""What `data check` found, as lines of text, as JSON, and as the flags to train with."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from chatglm_tuning.audit.check import DataReport, FileReport
from chatglm_tuning.audit.lengths import Limits
from chatglm_tuning.data.audit import ExampleReport, Finding, Overlap, prompts_with_other_answers
from chatglm_tuning.wording import counted

Verdict = Literal["fit to train on", "fit to train on, with remarks", "not fit to train on"]

_BAR = 40
_BINS = 12


def problems_of(report: DataReport) -> list[str]:
    """What keeps the data from being trained on as they are."""
    problems = []
    for files in _both(report):
        if files.bad_rows.count:
            problems.append(f"{counted(files.bad_rows.count, 'bad row')} in {_named(files)}, which training refuses")
        if not files.examples.examples:
            problems.append(f"no usable row in {_named(files)}")
    if (
        report.lengths
        and report.lengths.given.max_input_length + report.lengths.given.max_output_length > report.context
    ):
        given = report.lengths.given
        problems.append(
            f"--max_input_length {given.max_input_length} and --max_output_length {given.max_output_length} are more "
            f"than the model's context of {report.context} tokens"
        )
    return problems


def remarks_on_examples(reports: Iterable[ExampleReport], overlap: Overlap | None) -> list[str]:
    """What hurts training in the texts themselves, and what is in both training and evaluation."""
    remarks = [_described(what, found) for report in reports for what, found in report.findings.items()]
    if overlap is None:
        return remarks
    if overlap.pairs:
        remarks.append(
            f"{counted(overlap.pairs, 'example')} of the evaluation can be trained on, too: scores will be better than "
            "the model is"
        )
    if overlap.prompts:
        remarks.append(f"{counted(overlap.prompts, 'prompt')} of the evaluation with another answer in training")
    return remarks


def remarks_of(report: DataReport) -> list[str]:
    """What training takes, and what may make it worse than it could be."""
    remarks = remarks_on_examples((files.examples for files in _both(report)), report.overlap)
    for files in _both(report):
        if files.unanswered:
            remarks.append(f"conversations whose last turn has no answer, which is left out: {files.unanswered}")
    if report.lengths and report.lengths.given.cut:
        remarks.append(_cut(report.lengths.given) + ", and what is cut is not learnt")
    return remarks


def verdict_of(report: DataReport) -> Verdict:
    """Sum up the report."""
    if problems_of(report):
        return "not fit to train on"
    return "fit to train on, with remarks" if remarks_of(report) else "fit to train on"


def flags_of(report: DataReport) -> list[str]:
    """Return the flags to train with; empty where there is nothing to train on."""
    if report.lengths is None:
        return []
    advised = report.lengths.advised
    flags = ["--max_input_length", str(advised.max_input_length), "--max_output_length", str(advised.max_output_length)]
    if any(files.bad_rows.count and not files.bad_rows.is_fatal for files in _both(report)):
        flags.append("--skip_bad_rows")
    return flags


def _both(report: DataReport) -> Iterator[FileReport]:
    yield report.trained
    if report.evaluated:
        yield report.evaluated


def _named(files: FileReport) -> str:
    return ", ".join(files.paths)


def _described(what: str, found: Finding) -> str:
    more = ", …" if found.count > len(found.places) else ""
    return f"{what}: {found.count} ({', '.join(found.places)}{more})"


def _cut(limits: Limits) -> str:
    return (
        f"--max_input_length {limits.max_input_length} --max_output_length {limits.max_output_length} cut "
        f"{limits.cut_prompts:.1%} of the prompts and {limits.cut_answers:.1%} of the answers"
    )


def lines_of(report: DataReport) -> Iterator[str]:
    """Yield the report for a terminal."""
    for files in _both(report):
        yield from _lines_of_files(files)
    if report.trained.lengths is not None and report.lengths is not None:
        yield from _histogram("tokens of a prompt", report.trained.lengths.prompts)
        yield from _histogram("tokens of an answer", report.trained.lengths.answers)
        yield "limits"
        verdict = report.lengths
        for name, limits in (
            ("as given", verdict.given),
            ("cut 1 % at most", verdict.seldom),
            ("cut none", verdict.never),
        ):
            over = limits.max_input_length + limits.max_output_length > report.context
            yield f"  {name:<15}  {_cut(limits)}{f'; beyond the context of {report.context}' if over else ''}"
    yield from _listed("to be mended", problems_of(report))
    yield from _listed("remarks", remarks_of(report))
    yield f"verdict: {verdict_of(report)}"
    if flags := flags_of(report):
        yield f"train with: {' '.join(flags)}"


def _listed(title: str, entries: list[str]) -> Iterator[str]:
    if entries:
        yield title
        yield from (f"  - {entry}" for entry in entries)


def _lines_of_files(files: FileReport) -> Iterator[str]:
    found = files.examples
    yield f"{_named(files)}: {counted(found.examples, 'example')}, {counted(files.bad_rows.count, 'bad row')}"
    if files.shapes:
        yield "  shapes: " + ", ".join(f"{shape} {count}" for shape, count in files.shapes.items())
    if found.examples:
        yield "  languages: " + ", ".join(
            f"{name} {count / found.examples:.1%}" for name, count in found.languages.items()
        )
        several = prompts_with_other_answers(found)
        yield f"  prompts: {len(np.unique(found.prompts))} different, {several} of them with several answers"
    yield from (f"  {problem}" for problem in files.bad_rows.shown)


def _histogram(title: str, values: np.ndarray) -> Iterator[str]:
    """Yield a bar a line; the bins are of one width, and their first and last value are told."""
    counts, edges = bins_of(values)
    yield f"{title}: mean {values.mean():.1f}, median {np.median(values):.0f}, longest {values.max()}"
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        yield f"  {low:>5} to {high - 1:>5}  {'█' * round(_BAR * count / counts.max()):<{_BAR}} {count}"


def bins_of(values: np.ndarray, most: int = _BINS) -> tuple[np.ndarray, list[int]]:
    """Return the counts of `most` bins or less, of one whole width, and their edges: the first values, and the end."""
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // most))
    edges = list(range(low, high + width + 1, width))
    return np.histogram(values, edges)[0], edges


def content_of(report: DataReport) -> dict[str, Any]:
    """Return the report as what JSON can hold."""
    return {
        "verdict": verdict_of(report),
        "flags": flags_of(report),
        "problems": problems_of(report),
        "remarks": remarks_of(report),
        "context": report.context,
        "limits": asdict(report.lengths) if report.lengths else None,
        "overlap": asdict(report.overlap) if report.overlap else None,
        "trained": _content_of_files(report.trained),
        "evaluated": _content_of_files(report.evaluated) if report.evaluated else None,
    }


def _content_of_files(files: FileReport) -> dict[str, Any]:
    found = files.examples
    content: dict[str, Any] = {
        "paths": list(files.paths),
        "examples": found.examples,
        "bad_rows": files.bad_rows.count,
        "first_bad_rows": files.bad_rows.shown,
        "shapes": files.shapes,
        "unanswered": files.unanswered,
        "languages": found.languages,
        "different_prompts": len(np.unique(found.prompts)),
        "prompts_with_several_answers": prompts_with_other_answers(found),
        "findings": {what: asdict(finding) for what, finding in found.findings.items()},
    }
    if files.lengths is not None:
        content["tokens"] = {
            name: {"mean": float(values.mean()), "longest": int(values.max())}
            | {f"p{share}": int(np.percentile(values, share)) for share in (50, 90, 99)}
            for name, values in (("prompts", files.lengths.prompts), ("answers", files.lengths.answers))
        }
    return content
