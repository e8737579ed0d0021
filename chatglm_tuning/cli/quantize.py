"""`chatglm-tuning quantize`: a base in int8 or int4, written once as a folder of its own."""

from collections.abc import Sequence

from chatglm_tuning.config.quantize import parse_quantize_arguments


def run(argv: Sequence[str]) -> int:
    """Write the folder that `argv` asks for and print where it is; returns the exit code.

    Raises UserError for wrong flags, a model that cannot be quantised and a folder that cannot be written.
    """
    arguments = parse_quantize_arguments(argv)

    from chatglm_tuning.quantized_folder import write_quantized_folder

    size_bytes = write_quantized_folder(
        arguments.model_name_or_path, arguments.output_dir, arguments.quantization_bit, show_progress=True
    )
    print(f"{arguments.output_dir}: int{arguments.quantization_bit}, {size_bytes / 2**30:.2f} GiB of weights")
    return 0
