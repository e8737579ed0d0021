"""`chatglm-tuning data check`: what is in data files, before they are trained on."""

from collections.abc import Sequence
from pathlib import Path

from chatglm_tuning.config.data_check import parse_data_check_arguments
from chatglm_tuning.config.output_folder import check_output_folder
from chatglm_tuning.errors import UserError
from chatglm_tuning.wording import printable

_NOT_FIT = 1


def run(argv: Sequence[str]) -> int:
    """Print the report and write it; returns 0, or 1 where training would refuse the data.

    Raises UserError for wrong flags, for files that cannot be read, and where the report cannot be written.
    """
    if not argv or argv[0] not in ("check", "-h", "--help"):
        given = f"data {argv[0]} is no command" if argv else "data needs a command"
        raise UserError(given, code="A113", remedy="Write: chatglm-tuning data check --data_path FILE ...")
    arguments = parse_data_check_arguments(argv[1:] if argv[0] == "check" else argv)
    check_output_folder(arguments.output_dir)

    from chatglm_tuning.audit.check import check_data
    from chatglm_tuning.audit.picture import draw_lengths
    from chatglm_tuning.audit.report import content_of, lines_of, problems_of
    from chatglm_tuning.base_folder import load_tokenizer, read_config
    from chatglm_tuning.evaluation.files import json_text, write_all, writing_to
    from chatglm_tuning.shards import resolve_model_folder

    folder = resolve_model_folder(arguments.model)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    limits = (arguments.max_input_length, arguments.max_output_length)
    report = check_data(arguments.data_path, arguments.eval_path, tokenizer, limits, config.max_sequence_length)
    content = json_text(content_of(report))
    files: dict[Path, str | bytes] = {arguments.output_dir / "report.json": content}
    if report.lengths is not None:
        files[arguments.output_dir / "lengths.png"] = draw_lengths(report)
    with writing_to(arguments.output_dir):
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        write_all(files)
    print(content.rstrip("\n") if arguments.json else printable("\n".join(lines_of(report))))
    return _NOT_FIT if problems_of(report) else 0
