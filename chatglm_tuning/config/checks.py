"""What settings must hold together: each conflict and each missing setting is refused in one sentence."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from chatglm_tuning.config.arguments import GENERATION_METRICS, Method
from chatglm_tuning.config.arguments_file import read_arguments_file
from chatglm_tuning.errors import UserError


def check_train(method: Method, values: Mapping[str, Any]) -> None:
    """Raise UserError unless the merged settings of a training command make one run.

    Reads DeepSpeed's file, so that a wrong path does not show only after the model is loaded.
    """
    for name, what in (("data_path", "one or more files with training rows"), ("output_dir", "the folder to write to")):
        if name not in values:
            raise UserError(
                f"--{name} is missing", code="A104", remedy=f"Give {what}, as a flag or in the --train_args_file"
            )
    if method == "full":
        _check_full(values)
    _check_steps(values)
    if values.get("fp16") and values.get("bf16"):
        raise UserError("fp16 and bf16 exclude each other", code="A105", remedy="Keep one of the two")
    if "gradient_checkpointing" in values and "activation_checkpointing" in values:
        raise UserError(
            "gradient_checkpointing and activation_checkpointing are both given",
            code="A105",
            remedy="Keep activation_checkpointing, which says more",
        )
    if "max_tokens_per_batch" in values and not values.get("bucket_by_length", True):
        raise UserError(
            "max_tokens_per_batch puts rows of like length together, and no_bucket_by_length or "
            "train_sampling_strategy forbids it",
            code="A105",
            remedy="Keep one of the two",
        )
    if "max_tokens_per_batch" in values and values.get("auto_find_batch_size"):
        raise UserError(
            "auto_find_batch_size looks for a number of rows, and max_tokens_per_batch gives one of tokens",
            code="A105",
            remedy="Keep one of the two",
        )
    if values.get("eval_strategy", "no") != "no" and not values.get("eval_path"):
        raise UserError(
            f"eval_strategy {values['eval_strategy']} has nothing to evaluate",
            code="A108",
            remedy="Give --eval_path, or set eval_strategy to no",
        )
    _check_best(values)
    deepspeed = values.get("deepspeed")
    if isinstance(deepspeed, str) and not deepspeed.startswith("{"):
        read_arguments_file(Path(deepspeed).expanduser())


def _check_best(values: Mapping[str, Any]) -> None:
    """Refuse what is best by something that is not measured, or is kept at moments when nothing is measured."""
    samples = values.get("predict_samples", 0)
    evaluates = values.get("eval_strategy", "no") != "no"
    if samples and not values.get("eval_path"):
        raise UserError(
            "predict_samples has no prompts to answer", code="A108", remedy="Give --eval_path, or leave it out"
        )
    metric = values.get("metric_for_best_model", "loss")
    measured = ("loss", *(GENERATION_METRICS if samples else ()))
    if metric.removeprefix("eval_") not in measured:
        more = "" if samples else "; --predict_samples measures ROUGE, BLEU-4, chrF and distinct-2 too"
        raise UserError(
            f"metric_for_best_model is {metric!r}, and training evaluates {', '.join(measured)}{more}",
            code="A109",
            remedy=f"Set it to one of these: {', '.join(measured)}",
        )
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if values.get(name) and not evaluates:
            raise UserError(
                f"{name} needs evaluations while the run goes on",
                code="A108",
                remedy="Give --eval_path, and --eval_strategy steps",
            )
    saves, saving = values.get("save_strategy", "steps"), values.get("save_steps", 500)
    if saves == "best" and not evaluates:
        raise UserError(
            "save_strategy best needs evaluations while the run goes on",
            code="A108",
            remedy="Give --eval_strategy steps",
        )
    if not values.get("load_best_model_at_end") or saves == "best":
        return
    if saves != values["eval_strategy"]:
        raise UserError(
            f"load_best_model_at_end needs a checkpoint of what was evaluated: save_strategy is {saves}, and "
            f"eval_strategy {values['eval_strategy']}",
            code="A110",
            remedy="Set both to the same, or save_strategy to best",
        )
    evaluating = values.get("eval_steps", values.get("logging_steps", 500))
    if saves == "steps" and Fraction(str(saving)) % Fraction(str(evaluating)):
        raise UserError(
            f"load_best_model_at_end needs an evaluation at every checkpoint: save_steps is {saving}, and eval_steps "
            f"{evaluating}",
            code="A110",
            remedy="Set save_steps to eval_steps, or to a multiple of it",
        )


def check_chat(values: Mapping[str, Any]) -> None:
    """Raise UserError unless the settings of chat go together."""
    if "lora_checkpoint" in values and "ptuning_checkpoint" in values:
        raise UserError(
            "--lora_checkpoint and --ptuning_checkpoint are both given", code="A105", remedy="Chat with one adapter"
        )
    for name in ("pre_seq_len", "prefix_projection"):
        if values.get(name) and "ptuning_checkpoint" not in values:
            raise UserError(
                f"--{name} describes a prefix, and none is given",
                code="A106",
                remedy="Give its folder with --ptuning_checkpoint, or leave it out",
            )


def _check_full(values: Mapping[str, Any]) -> None:
    if values.get("prefix_projection"):
        raise UserError(
            "--prefix_projection needs --pre_seq_len", code="A106", remedy="Give the number of prefix positions, as 128"
        )
    if "quantization_bit" in values:
        raise UserError(
            f"a base in {values['quantization_bit']} bits cannot be tuned in full",
            code="A107",
            remedy="Give --pre_seq_len to tune a prefix, or leave out the quantization",
        )


def _check_steps(values: Mapping[str, Any]) -> None:
    if values.get("max_steps") == 0:
        raise UserError(
            "max_steps 0 trains nothing", code="A103", remedy="Give a number of optimizer steps, or -1 for epochs"
        )
    for name in ("warmup_steps", "logging_steps", "eval_steps", "save_steps"):
        steps = values.get(name, 0)
        if steps > 1 and steps != int(steps):
            raise UserError(
                f"{name} {steps} is neither a whole number nor below 1",
                code="A103",
                remedy="Give a number of steps, or a share of all steps below 1",
            )
