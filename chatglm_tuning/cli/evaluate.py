"""`chatglm-tuning eval`: predictions scored as the model's authors scored them, and adapters compared."""

import sys
from collections.abc import Sequence

from chatglm_tuning.cli.log import log_to_stderr
from chatglm_tuning.config.evaluate import parse_eval_arguments
from chatglm_tuning.config.output_folder import check_output_folder

# Of a table that goes into a file or a pipe, where rich would assume 80 columns.
_WIDTH = 140


def run(argv: Sequence[str]) -> int:
    """Print the scores that `argv` asks for, with their convention, and return the exit code.

    Raises UserError for wrong flags, data, models, adapters and predictions before a model is loaded.
    """
    arguments = parse_eval_arguments(argv)
    log_to_stderr()
    if arguments.output_dir is not None:
        check_output_folder(arguments.output_dir)

    from rich.console import Console

    from chatglm_tuning.evaluation.evaluate import evaluate
    from chatglm_tuning.evaluation.report import closing_lines, differences_table, scores_table

    found = evaluate(arguments, show_progress=True)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(scores_table(found.comparisons))
    if found.comparisons[0].differences:
        console.print(differences_table(found.comparisons[0]))
    for line in closing_lines(found, arguments.output_dir):
        print(line)
    return 0
