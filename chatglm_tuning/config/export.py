"""The settings of `chatglm-tuning export`, from the command line to frozen arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatglm_tuning.config.arguments import ChatArguments, ModelArguments, PtuningArguments, Setting, settings_of
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.sources import Registry, resolve_flags
from chatglm_tuning.config.values import Value
from chatglm_tuning.errors import UserError

ExportFormat = Literal["folder", "ggml", "original", "adapter"]
GgmlKind = Literal["f32", "f16", "q8_0", "q4_0"]

_FORMAT = Setting(
    "format",
    Value("text", choices=("folder", "ggml", "original", "adapter")),
    "folder: a LoRA merged into a model folder, a prefix packaged beside its base; ggml: a LoRA merged into a file for "
    "chatglm.cpp; original: what the original's scripts read (peft 0.3, or pytorch_model.bin); adapter: what this "
    "program writes",
    "folder",
)
_OUTPUT = Setting("output_dir", Value("path"), "new folder for what is exported", None)
_MERGE_ONTO = Setting(
    "merge_onto",
    Value("text", choices=("trained", "full")),
    "weights that a LoRA trained on an int8 or int4 base is added to: those it was trained on, or the full-precision "
    "ones of the base",
    "trained",
)
_HELD_BITS = Setting(
    "quantization_bit",
    Value("integer", choices=(4, 8)),
    "bits that the base was held in while the LoRA was trained; without it, what the adapter's folder says",
    None,
)
_OUTPUT_BITS = Setting(
    "output_quantization_bit",
    Value("integer", choices=(4, 8)),
    "quantise the merged weights to this many bits, in the released layout; without it, full precision",
    None,
)
_DTYPE = Setting(
    "dtype",
    Value("text", choices=("float32", "bfloat16", "float16")),
    "type of the merged weights; without it, what the base is stored in",
    None,
)
_GGML_TYPE = Setting(
    "ggml_type", Value("text", choices=("f32", "f16", "q8_0", "q4_0")), "type of a GGML file's matrices", "f16"
)
_INCLUDE_BASE = Setting("include_base", Value("boolean"), "copy the base beside a packaged prefix", False)
_DATA = Setting(
    "data_path",
    Value("paths"),
    "one or more files with rows whose prompts are compared too, beside the built-in ones",
    (),
)
_TOKENS = Setting(
    "probe_tokens", Value("integer", at_least=1, at_most=512), "greedy tokens that are compared for each prompt", 16
)
_SCORES = Setting(
    "scores", Value("path"), "scores.json for the model card; without it, the one in the adapter's folder if any", None
)
_OF_A_MERGE = (_MERGE_ONTO, _HELD_BITS, _OUTPUT_BITS, _DTYPE, _DATA, _TOKENS)


@dataclass(frozen=True)
class ExportArguments:
    """One export. adapter: the folder of a LoRA (method "lora") or of a prefix ("ptuning").

    merge_onto: whether quantization_bit, or what the adapter says, decides over the base's weights ("trained").
    """

    method: Literal["lora", "ptuning"]
    adapter: Path
    output_dir: Path
    model_name_or_path: str = ModelArguments.model_name_or_path
    format: ExportFormat = _FORMAT.default
    merge_onto: Literal["trained", "full"] = _MERGE_ONTO.default
    quantization_bit: Literal[4, 8] | None = None
    output_quantization_bit: Literal[4, 8] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    ggml_type: GgmlKind = _GGML_TYPE.default
    include_base: bool = False
    data_path: tuple[Path, ...] = ()
    probe_tokens: int = _TOKENS.default
    scores: Path | None = None

    @property
    def is_merge(self) -> bool:
        """Whether weights are written that answer without the adapter."""
        return self.method == "lora" and self.format in ("folder", "ggml")


def parse_export_arguments(argv: Sequence[str]) -> ExportArguments:
    """Return what `argv` (without the program's name) asks for; prints and raises as training does."""
    model = next(setting for setting in settings_of(ModelArguments) if setting.name == "model_name_or_path")
    lora = next(setting for setting in settings_of(ChatArguments) if setting.name == "lora_checkpoint")
    prefix = next(setting for setting in settings_of(PtuningArguments) if setting.name == "ptuning_checkpoint")
    groups = [
        FlagGroup("what is exported", (model, lora, prefix)),
        FlagGroup("as what", (_FORMAT, _OUTPUT, _INCLUDE_BASE, _GGML_TYPE, _SCORES)),
        FlagGroup("merging a LoRA", (_MERGE_ONTO, _HELD_BITS, _OUTPUT_BITS, _DTYPE)),
        FlagGroup("the comparison with base and adapter", (_DATA, _TOKENS)),
    ]
    settings = [setting for group in groups for setting in group.settings]
    description = "Merge, convert and package an adapter for others to use."
    parser = build_parser("chatglm-tuning export", description, groups)
    values = resolve_flags(read_flags(parser, argv, {}), Registry.of(settings, {}))
    found = {"lora": values.pop(lora.name, None), "ptuning": values.pop(prefix.name, None)}
    given = {method: path for method, path in found.items() if path is not None}
    if len(given) != 1:
        raise UserError(
            "--lora_checkpoint and --ptuning_checkpoint are both given" if given else "there is no adapter to export",
            code="A105" if given else "A104",
            remedy="Give one of --lora_checkpoint and --ptuning_checkpoint; chatglm-tuning quantize writes a base "
            "alone",
        )
    if _OUTPUT.name not in values:
        raise UserError("--output_dir is missing", code="A104", remedy="Give the new folder")
    ((method, adapter),) = given.items()
    arguments = ExportArguments(method=method, adapter=adapter, **values)  # pyright: ignore[reportArgumentType]
    _check(arguments, values)
    return arguments


def _check(arguments: ExportArguments, values: Mapping[str, Any]) -> None:
    """Raise UserError for flags that do not go together. values: those that were typed."""
    if arguments.method == "ptuning" and arguments.format == "ggml":
        raise UserError(
            "a prefix cannot be put into a GGML file: chatglm.cpp 0.4.2 reads none for ChatGLM-6B",
            code="E109",
            remedy="Package it with --format folder, or train a LoRA, which can be merged",
        )
    if not arguments.is_merge:
        typed = next((setting.name for setting in _OF_A_MERGE if setting.name in values), None)
        if typed is not None:
            raise UserError(
                f"--{typed} has no effect on --format {arguments.format} of a "
                f"{'LoRA' if arguments.method == 'lora' else 'prefix'}, which writes the adapter as it is",
                code="A106",
                remedy="Leave it out",
            )
    if arguments.format == "ggml":
        typed = next((name for name in ("dtype", "output_quantization_bit") if name in values), None)
        if typed is not None:
            raise UserError(
                f"--{typed} is not for a GGML file", code="A106", remedy="Give --ggml_type f32, f16, q8_0 or q4_0"
            )
    elif "ggml_type" in values:
        raise UserError(
            "--ggml_type is for --format ggml alone", code="A106", remedy="Add --format ggml, or leave it out"
        )
    if arguments.include_base and not (arguments.method == "ptuning" and arguments.format == "folder"):
        raise UserError(
            "--include_base is for packaging a prefix with --format folder", code="A106", remedy="Leave it out"
        )
    if arguments.merge_onto == "full" and arguments.quantization_bit:
        raise UserError(
            "--merge_onto full adds the LoRA to full-precision weights, and --quantization_bit to quantised ones",
            code="A105",
            remedy="Keep one of the two; --output_quantization_bit quantises the result",
        )
