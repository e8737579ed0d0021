"""`chatglm-tuning predict`: the prompts of data files answered in batches, into one file."""

from collections.abc import Sequence

from chatglm_tuning.cli.log import log_to_stderr
from chatglm_tuning.config.output_folder import check_output_folder
from chatglm_tuning.config.predict import parse_predict_arguments


def run(argv: Sequence[str]) -> int:
    """Write the predictions that `argv` asks for and print where they are; returns the exit code.

    Raises UserError for wrong flags, data, models and adapters before the model is loaded.
    """
    arguments = parse_predict_arguments(argv)
    log_to_stderr()
    check_output_folder(arguments.output_dir)

    from chatglm_tuning.evaluation.predict import plan_run, predict
    from chatglm_tuning.evaluation.task import Models, check_adapter_of, prepare_task

    task = prepare_task(arguments.model, arguments.answers, needs_references=False)
    check_adapter_of(task, arguments.adapter)
    planned = plan_run(task, arguments.adapter, arguments.output_dir, overwrite=arguments.overwrite)
    print(predict(planned, Models(task, show_progress=True)))
    return 0
