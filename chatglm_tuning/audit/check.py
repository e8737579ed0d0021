"""`chatglm-tuning data check`: everything that is looked at before a dataset is trained on, and a verdict."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chatglm_tuning.audit.lengths import Lengths, Limits, count_tokens, limits_at, limits_that_cut
from chatglm_tuning.data.audit import ExampleAudit, ExampleReport, Overlap, overlap_of
from chatglm_tuning.data.encode import TextEncoder
from chatglm_tuning.data.records import RowsSeen, iterate_examples
from chatglm_tuning.data.rows import BadRows, check_files

_SELDOM = 0.01


@dataclass(frozen=True)
class FileReport:
    """The examples of a set of files. lengths: None where there is no example at all."""

    paths: tuple[str, ...]
    bad_rows: BadRows
    shapes: dict[str, int]
    unanswered: int
    examples: ExampleReport
    lengths: Lengths | None


@dataclass(frozen=True)
class LengthVerdict:
    """What the limits that were given cut, the smallest ones that cut one example in a hundred, and none."""

    given: Limits
    seldom: Limits
    never: Limits

    @property
    def advised(self) -> Limits:
        """Those that were given where they cut at most one in a hundred, else the smallest that do not."""
        return self.given if self.given.cut <= _SELDOM else self.seldom


@dataclass(frozen=True)
class DataReport:
    """All that was found. context: tokens that the model can hold."""

    trained: FileReport
    evaluated: FileReport | None
    overlap: Overlap | None
    lengths: LengthVerdict | None
    context: int


def check_data(
    data_path: Sequence[Path],
    eval_path: Sequence[Path],
    tokenizer: TextEncoder,
    limits: tuple[int, int],
    context: int,
) -> DataReport:
    """Read every row of the files and look at it.

    limits: max_input_length and max_output_length. context: tokens of prompt and answer that the model can hold.
    Raises UserError where a file cannot be read; bad rows are part of the report.
    """
    trained = _check_files(data_path, tokenizer)
    evaluated = _check_files(eval_path, tokenizer) if eval_path else None
    verdict = None
    if trained.lengths is not None:
        verdict = LengthVerdict(
            limits_at(trained.lengths, *limits),
            limits_that_cut(trained.lengths, _SELDOM),
            limits_that_cut(trained.lengths, 0),
        )
    overlap = overlap_of(trained.examples, evaluated.examples) if evaluated else None
    return DataReport(trained, evaluated, overlap, verdict, context)


def _check_files(paths: Sequence[Path], tokenizer: TextEncoder) -> FileReport:
    bad_rows, seen, audit = BadRows(), RowsSeen(Counter()), ExampleAudit()
    examples = audit.watch(iterate_examples(check_files(paths), bad_rows, seen=seen))
    lengths = count_tokens(examples, tokenizer)
    found = audit.report()
    return FileReport(
        tuple(map(str, paths)),
        bad_rows,
        dict(seen.shapes.most_common()),
        seen.unanswered,
        found,
        lengths if found.examples else None,
    )
