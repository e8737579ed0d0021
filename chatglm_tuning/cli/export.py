"""`chatglm-tuning export`: an adapter merged, converted or packaged for others to use."""

import logging
import sys
from collections.abc import Sequence

from chatglm_tuning.cli.log import log_to_stderr
from chatglm_tuning.config.export import parse_export_arguments
from chatglm_tuning.config.output_folder import check_output_folder


def run(argv: Sequence[str]) -> int:
    """Write the folder that `argv` asks for and print what it is; returns the exit code.

    Raises UserError for wrong flags, whatever cannot be exported, and an export that does not answer as it should.
    """
    arguments = parse_export_arguments(argv)
    check_output_folder(arguments.output_dir)
    log_to_stderr()
    # How fast the base was read, twice or three times, is of no interest here.
    logging.getLogger("chatglm_tuning.loading").setLevel(logging.WARNING)

    try:
        from chatglm_tuning.export.run import export

        print(f"{arguments.output_dir}: {export(arguments, show_progress=True)}")
    except KeyboardInterrupt:
        print(f"interrupted: {arguments.output_dir} was not written, and nothing is left of it", file=sys.stderr)
        raise
    return 0
