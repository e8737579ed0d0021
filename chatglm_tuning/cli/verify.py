"""`chatglm-tuning verify`: whether a folder is whole, and answers as it did when it was saved."""

import logging
import sys
from collections.abc import Sequence

from chatglm_tuning.config.verify import parse_verify_arguments
from chatglm_tuning.wording import counted, printable

_DOES_NOT_HOLD = 1


def run(argv: Sequence[str]) -> int:
    """Print one line a check; returns 0, or 1 where one does not hold.

    Raises UserError for wrong flags, and where there is nothing to verify.
    """
    arguments = parse_verify_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)

    from chatglm_tuning.verification.verify import verify

    failed = 0
    for check in verify(arguments):
        print(printable(check.line), flush=True)
        failed += check.holds is False
    print(f"{arguments.folder}: " + (f"{counted(failed, 'check')} failed" if failed else "verified"))
    return _DOES_NOT_HOLD if failed else 0
