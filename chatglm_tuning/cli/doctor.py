"""`chatglm-tuning doctor`: what is the matter with this machine, an error code, or a traceback."""

import os
import sys
from collections.abc import Sequence

from chatglm_tuning.config.doctor import DoctorArguments, parse_doctor_arguments
from chatglm_tuning.wording import printable

_PROBLEM = 1


def run(argv: Sequence[str]) -> int:
    """Print what is found or explained; returns 0, or 1 where there is a problem or nothing is known of a traceback.

    Raises UserError for wrong flags, an unknown code and a file that cannot be read.
    """
    arguments = parse_doctor_arguments(argv, os.environ)
    try:
        return _answer(arguments)
    except BrokenPipeError:  # whoever read it wants no more, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail again
        return 0


def _answer(arguments: DoctorArguments) -> int:
    if arguments.code is not None:
        from chatglm_tuning.doctor.pages import page

        print(page(arguments.code, arguments.language))
        return 0
    if arguments.traceback is not None:
        from chatglm_tuning.doctor.tracebacks import explain, read_pasted

        explanation = explain(read_pasted(arguments.traceback), arguments.language)
        print(printable("\n".join(explanation.lines)))
        return 0 if explanation.is_known else _PROBLEM
    from chatglm_tuning.doctor.report import examine, summary_of

    findings = []
    for finding in examine(arguments.model, arguments.output_dir):
        print(printable(finding.line), flush=True)
        findings.append(finding)
    print(f"\n{summary_of(findings)}")
    return _PROBLEM if any(finding.status == "problem" for finding in findings) else 0
