"""The state of an optimizer, held against what the optimizer of this run would itself have."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

_ROWS, _COLUMNS = 3, 5
"""Sizes of the stand-in parameters, by which the sizes in their states are known again."""


@dataclass(frozen=True)
class Layout:
    """What an optimizer holds. groups: settings of a group. states: of a parameter of so many dimensions, by name."""

    groups: Mapping[str, Any]
    states: Mapping[int, Mapping[str, Any]]


def find_layout(arguments: TrainingArguments) -> Layout | None:
    """Return what the optimizer of a run holds, found by a step of a small one; None where it cannot be made alone."""
    parameters = [torch.zeros(_ROWS, _COLUMNS), torch.zeros(_ROWS)]
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = kind(parameters, **settings)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except Exception:  # another package's, which needs the model, a GPU or larger parameters
        return None
    state = optimizer.state_dict()
    states = {parameter.dim(): state["state"].get(index, {}) for index, parameter in enumerate(parameters)}
    return Layout({key: value for key, value in state["param_groups"][0].items() if key != "params"}, states)


def check_kinds(state: Any) -> None:
    """Raise TypeError, ValueError or KeyError for what is no state of an optimizer at all."""
    groups, states = state["param_groups"], state["state"]
    if not (isinstance(groups, list) and groups and isinstance(states, dict)):
        raise TypeError("no groups of parameters")
    known = [parameter for group in groups for parameter in group["params"]]
    if len(set(known)) != len(known) or not states.keys() <= set(known):
        raise ValueError("states of parameters that no group has")
    if not all(isinstance(values, dict) for values in states.values()):
        raise TypeError("a state is no dictionary")


def has_layout(state: Any, layout: Layout) -> bool:
    """Return whether a state, of the right kinds, has the names that an optimizer of `layout` reads."""
    names = {frozenset(expected) for expected in layout.states.values()}
    has_groups = all(layout.groups.keys() <= group.keys() for group in state["param_groups"])
    return has_groups and all(frozenset(values) in names for values in state["state"].values())


def check_values(state: Any, layout: Layout, parameters: Mapping[Any, Tensor] | None = None) -> None:
    """Raise TypeError, ValueError or KeyError where a value is of another kind or shape than the optimizer's own.

    parameters: what is trained, by what `state` calls it; None where only kinds can be seen. Optimizers write to their
    states in place, some of them without looking at shapes.
    """
    if not has_layout(state, layout):
        raise ValueError("it is of another optimizer")
    for group in state["param_groups"]:
        for name, example in layout.groups.items():
            if not _is_like(group[name], example):
                raise TypeError(f"{name} is of another kind")
    if parameters is None:
        for values in state["state"].values():
            examples = next(found for found in layout.states.values() if found.keys() == values.keys())
            for name, value in values.items():
                _check_value(value, examples[name], None)
        return
    known = [parameter for group in state["param_groups"] for parameter in group["params"]]
    if known_otherwise := set(known) ^ parameters.keys():
        raise ValueError(f"other parameters: {known_otherwise}")
    for parameter, values in state["state"].items():
        shape = tuple(parameters[parameter].shape)
        for name, example in layout.states[len(shape)].items():
            _check_value(values[name], example, shape)


def load_apart(optimizer: Any, state: Any) -> None:
    """Load `state` into an optimizer, which shares none of its tensors afterwards: they may be mapped from a file.

    An optimizer takes what is on its parameter's device as it is, and copies the rest there: only what stays on the CPU
    is copied here, one tensor at a time. States for a GPU are never held a second time on the CPU.
    """
    optimizer.load_state_dict(state)
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                values[name] = deepcopy(value)


def _check_value(value: Any, example: Any, shape: tuple[int, ...] | None) -> None:
    if not isinstance(example, Tensor):
        if not _is_like(value, example):
            raise TypeError("of another kind")
        return
    if value.is_floating_point() != example.is_floating_point() or value.is_complex() or not value.is_contiguous():
        raise TypeError("a tensor of another kind")
    if shape is not None and tuple(value.shape) != _shape_of(example, shape):
        raise ValueError(f"{tuple(value.shape)} for a parameter of {shape}")


def _shape_of(example: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a value has for a parameter of `shape`, as `example` has it for the stand-in."""
    sizes: dict[int, int] = dict(zip((_ROWS, _COLUMNS), shape, strict=False))
    return tuple(sizes.get(size, size) for size in example.shape)


def _is_like(value: Any, example: Any) -> bool:
    if isinstance(example, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(example) and all(map(_is_like, value, example))
    if example is None or isinstance(example, bool):
        return value is None or isinstance(value, bool | int | float)
    if isinstance(example, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(example))
