"""From the command line to frozen arguments. Precedence: default < JSON file < a flag that was typed."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from chatglm_tuning.config.arguments import (
    DEFAULT_SEED,
    LORA_TARGETS,
    ChatArguments,
    DataArguments,
    LoraArguments,
    Method,
    ModelArguments,
    PtuningArguments,
    RunOptions,
    Setting,
    TrainerArguments,
    TrainRun,
    settings_of,
)
from chatglm_tuning.config.arguments_file import read_arguments_file
from chatglm_tuning.config.checks import check_chat, check_train
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.legacy import LEGACY_KEYS
from chatglm_tuning.config.sources import Registry, merge, resolve_file, resolve_flags
from chatglm_tuning.config.training_arguments import TRAINER_FLAGS, TRAINING_ARGUMENTS
from chatglm_tuning.config.values import Value

Script = Literal["lora", "ptuning"]
Arguments = TypeVar("Arguments")

_PROGRAMS: dict[Script, str] = {"lora": "train-lora", "ptuning": "train-ptuning"}
_TITLES: dict[Script, str] = {"lora": "LoRA", "ptuning": "P-Tuning v2 (without a prefix: full fine-tuning)"}
_METHOD_ARGUMENTS: dict[Script, type] = {"lora": LoraArguments, "ptuning": PtuningArguments}
_ARGUMENTS_FILE = Setting("train_args_file", Value("path"), "JSON file with any of these settings, by name", None)
_WARMUP_RATIO = Setting("warmup_ratio", Value("number"), "the share of all steps, as warmup_steps below 1", None)


def parse_train_arguments(script: Script, argv: Sequence[str]) -> TrainRun:
    """Return the run that `argv` (without the program's name) and its --train_args_file ask for.

    script: "lora", or "ptuning", which without a prefix means full fine-tuning.
    Prints the help and raises SystemExit for --help; raises UserError for whatever is wrong. Reads no other files than
    the JSON ones, and imports neither torch nor transformers.
    """
    groups = _train_groups(script)
    own = [setting for group in groups[1:-1] for setting in group.settings]
    registry = Registry.of(own, TRAINING_ARGUMENTS)
    others = _settings_of_the_other(script)
    in_file = f"Put it into the JSON file of --{_ARGUMENTS_FILE.name}"
    elsewhere = {name: in_file for name in (*TRAINING_ARGUMENTS, *LEGACY_KEYS)} | others
    typed = read_flags(_train_parser(script, groups), argv, elsewhere)
    path = typed.pop(_ARGUMENTS_FILE.name, None)
    from_file: dict[str, Any] = {}
    if path is not None:
        file = read_arguments_file(_ARGUMENTS_FILE.value.convert(path, name=f"--{_ARGUMENTS_FILE.name}"))
        from_file = resolve_file(file, registry, _PROGRAMS[script], others)
    values = merge(from_file, resolve_flags(typed, registry))
    method = _method(script, values)
    check_train(method, values)
    return _train_run(method, values)


def parse_chat_arguments(argv: Sequence[str]) -> ChatArguments:
    """Return the chat that `argv` (without the program's name) asks for; prints and raises as training does."""
    classes = {"model": ModelArguments, "prefix": PtuningArguments, "chat": ChatArguments}
    groups = [FlagGroup(title, tuple(settings_of(arguments))) for title, arguments in classes.items()]
    parser = build_parser("chatglm-tuning chat", "Chat with ChatGLM-6B, tuned or not.", groups)
    registry = Registry.of([setting for group in groups for setting in group.settings], {})
    values = resolve_flags(read_flags(parser, argv, {}), registry)
    check_chat(values)
    nested = {"model": _build(ModelArguments, values), "ptuning": _build(PtuningArguments, values)}
    return _build(ChatArguments, values, **nested)


def _train_groups(script: Script) -> list[FlagGroup]:
    """The sections of --help; the first is the file, the last is Trainer's."""
    classes = {
        "model": ModelArguments,
        "data": DataArguments,
        _TITLES[script]: _METHOD_ARGUMENTS[script],
        "run": RunOptions,
    }
    trainer = [
        Setting(name, TRAINING_ARGUMENTS[name], text, DEFAULT_SEED if name == "seed" else None)
        for name, text in TRAINER_FLAGS.items()
    ]
    return [
        FlagGroup("file (a typed flag goes before it)", (_ARGUMENTS_FILE,)),
        *(FlagGroup(title, tuple(settings_of(arguments))) for title, arguments in classes.items()),
        FlagGroup("Trainer (the other keys of TrainingArguments go into the file)", (*trainer, _WARMUP_RATIO)),
    ]


def _train_parser(script: Script, groups: Sequence[FlagGroup]) -> argparse.ArgumentParser:
    what = "LoRA" if script == "lora" else "P-Tuning v2, or in full"
    return build_parser(f"chatglm-tuning {_PROGRAMS[script]}", f"Tune ChatGLM-6B with {what}.", groups)


def _settings_of_the_other(script: Script) -> dict[str, str]:
    other: Script = "ptuning" if script == "lora" else "lora"
    remedy = f"It belongs to {_PROGRAMS[other]}: leave it out here"
    return {setting.name: remedy for setting in settings_of(_METHOD_ARGUMENTS[other])}


def _method(script: Script, values: Mapping[str, Any]) -> Method:
    if script == "lora":
        return "lora"
    return "ptuning" if "pre_seq_len" in values or "ptuning_checkpoint" in values else "full"


def _train_run(method: Method, values: dict[str, Any]) -> TrainRun:
    if "all" in values.get("lora_target", ()):
        values["lora_target"] = LORA_TARGETS
    classes = {"model": ModelArguments, "data": DataArguments, "options": RunOptions}
    if method != "full":
        classes[method] = _METHOD_ARGUMENTS[method]
    own = {setting.name for arguments in classes.values() for setting in settings_of(arguments)}
    # TrainingArguments tells one name from several by `list`, and takes a tuple for one name.
    trainer = {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if name not in own
    }
    parts = {name: _build(arguments, values) for name, arguments in classes.items()}
    return TrainRun(method=method, trainer=TrainerArguments({"seed": DEFAULT_SEED} | trainer), **parts)


def _build(arguments: type[Arguments], values: Mapping[str, Any], **nested: Any) -> Arguments:
    given = {setting.name: values[setting.name] for setting in settings_of(arguments) if setting.name in values}
    return arguments(**given, **nested)
