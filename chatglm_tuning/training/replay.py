"""Where a number first stopped being finite: a micro-batch is computed again, with every module watched."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass was given.

    inputs: the model's keywords. rng_state, cuda_rng_state: of torch's generators before it, for the same dropout.
    """

    inputs: Mapping[str, Any]
    rng_state: Tensor
    cuda_rng_state: Tensor | None


@dataclass(frozen=True)
class Finding:
    """The first value that is not finite, in the order of the computation.

    kind: of which sort it is. name: the module whose output (of the loss: "loss") or output's gradient it is in, or the
    parameter. micro_batch: counted from 0; None for a parameter, which is so before any batch.
    """

    kind: Literal["parameter", "activation", "gradient"]
    name: str
    micro_batch: int | None

    def describe(self) -> str:
        """Return it as the end of a sentence: "the output of transformer.layers.3.mlp"."""
        if self.kind == "parameter":
            return f"the parameter {self.name}"
        if self.kind == "activation":
            return "the loss itself" if self.name == "loss" else f"the output of {self.name}"
        return f"the gradient of {self.name}"


def take_micro_batch(inputs: Mapping[str, Any]) -> MicroBatch:
    """Keep `inputs` and the states of the generators, as they are before the forward pass."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return MicroBatch(dict(inputs), torch.get_rng_state(), cuda)


def find_first(
    model: nn.Module,
    micro_batches: Sequence[MicroBatch],
    compute_loss: Callable[[Mapping[str, Any]], Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Finding | None:
    """Compute `micro_batches` again, all of them, and return where a value was not finite first; None where all are.

    compute_loss: the inputs' loss as training computes it. The gradients of `model` are overwritten.
    Every process of a run must call it with the same number of micro-batches, since a sharded model is gathered.
    """
    found = _first_parameter(model)
    for index, batch in enumerate(micro_batches):
        watch = _Watch(index)
        with watch.on(model):
            torch.set_rng_state(batch.rng_state)
            if batch.cuda_rng_state is not None:
                torch.cuda.set_rng_state(batch.cuda_rng_state)
            model.zero_grad()
            with autocast():
                loss = compute_loss(batch.inputs)
            watch.see_loss(loss)
            loss.backward()
        found = found or watch.found or _first_gradient(model, index)
    return found


class _Watch:
    """Forward hooks on all modules, and through them hooks on the gradients of their outputs."""

    def __init__(self, micro_batch: int) -> None:
        self._micro_batch = micro_batch
        self.found: Finding | None = None

    def on(self, model: nn.Module) -> "_Hooks":
        return _Hooks(model, self._see_output)

    def _see_output(self, name: str, output: Any) -> None:
        for tensor in _tensors_of(output):
            if not is_finite(tensor):
                self._note("activation", name)
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._see_gradient(name, gradient))

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        if not is_finite(gradient):
            self._note("gradient", f"the output of {name}")

    def see_loss(self, loss: Tensor) -> None:
        if not is_finite(loss):
            self._note("activation", "loss")

    def _note(self, kind: Literal["activation", "gradient"], name: str) -> None:
        self.found = self.found or Finding(kind, name, self._micro_batch)


class _Hooks:
    """Forward hooks that tell the name of their module; a context manager."""

    def __init__(self, model: nn.Module, see: Callable[[str, Any], None]) -> None:
        self._handles = [
            module.register_forward_hook(lambda _module, _inputs, output, name=name: see(name, output))
            for name, module in model.named_modules()
            if name
        ]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _tensors_of(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in _tensors_of(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in _tensors_of(value)]
    return []


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value of `tensor` is infinite or NaN."""
    local = getattr(tensor, "to_local", lambda: tensor)()  # of a sharded tensor, this process's part
    return not local.is_floating_point() or bool(torch.isfinite(local).all())


def _first_parameter(model: nn.Module) -> Finding | None:
    for name, parameter in model.named_parameters():
        if not is_finite(parameter.detach()):
            return Finding("parameter", name, None)
    return None


def _first_gradient(model: nn.Module, micro_batch: int) -> Finding | None:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not is_finite(parameter.grad):
            return Finding("gradient", name, micro_batch)
    return None
