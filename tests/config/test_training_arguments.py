"""The list of TrainingArguments' fields against the installed transformers, so that it cannot rot."""

import dataclasses
import types
import typing

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from chatglm_tuning.config.legacy import LEGACY_KEYS
from chatglm_tuning.config.training_arguments import CHOICES, TRAINER_FLAGS, TRAINING_ARGUMENTS

NOT_FROM_TEXT = {"parallelism_config"}
FIELDS = {
    field.name: field
    for field in dataclasses.fields(TrainingArguments)
    if field.init and field.name not in NOT_FROM_TEXT
}
ANYTHING = {"include_num_input_tokens_seen", "trackio_static_space_id", "fsdp", "optim_target_modules"}
KIND_OF = {bool: "boolean", int: "integer", float: "number"}


def expected_kind(name):
    if name in ANYTHING:
        return "anything"
    annotation = FIELDS[name].type
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    plain = [option for option in options if option is not types.NoneType]
    if len(plain) == 1 and plain[0] in KIND_OF:
        return KIND_OF[plain[0]]
    if any(option is dict or typing.get_origin(option) is dict for option in plain):
        return "mapping"
    return "names" if any(typing.get_origin(option) is list for option in plain) else "text"


def test_names_are_the_fields():
    assert set(TRAINING_ARGUMENTS) == set(FIELDS)


@pytest.mark.parametrize("name", sorted(TRAINING_ARGUMENTS))
def test_kind_is_the_fields_type(name):
    assert TRAINING_ARGUMENTS[name].kind == expected_kind(name)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lr_scheduler_type", SchedulerType),
        ("optim", OptimizerNames),
        ("logging_strategy", IntervalStrategy),
        ("eval_strategy", IntervalStrategy),
        ("save_strategy", SaveStrategy),
        ("hub_strategy", HubStrategy),
    ],
)
def test_choices_are_the_enumeration(name, options):
    assert set(CHOICES[name]) == {option.value for option in options}


def test_sampling_choices_are_the_fields():
    assert list(CHOICES["train_sampling_strategy"]) == FIELDS["train_sampling_strategy"].metadata["choices"]


def test_defaults_of_transformers_are_in_range():
    for name, value in TRAINING_ARGUMENTS.items():
        default = FIELDS[name].default
        if default is not None and default is not dataclasses.MISSING and default != "":
            assert value.convert(default, name=name) in (default, (default,))


def test_flags_are_fields():
    assert set(TRAINER_FLAGS) <= set(TRAINING_ARGUMENTS)


def test_legacy_keys_are_gone_or_renamed():
    still_there = {"gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"}
    assert set(LEGACY_KEYS) & set(FIELDS) == still_there
