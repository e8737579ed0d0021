"""What stops a run at once: numbers that are not finite, and in its first steps what shows that nothing is learned.

Every optimizer step is looked at before the optimizer takes it, so that the weights stay as they were. All processes
come to the same end together: what one has seen is told to the others.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import TrainerState

from chatglm_tuning.checkpoint import whole_checkpoints
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMConfig
from chatglm_tuning.model.modeling import ChatGLMBlock
from chatglm_tuning.training.expected import check_first_loss, check_no_collapse, tell
from chatglm_tuning.training.replay import Finding, MicroBatch, find_first, take_micro_batch
from chatglm_tuning.training.stopped import StoppedStep, write_stopped_step

logger = logging.getLogger(__name__)

_FIRST_STEPS = 3
_STEPS_TO_COLLAPSE = 50
_SAMPLED_VALUES = 64


@dataclass(frozen=True)
class Surroundings:
    """What the tripwires need of the run.

    model: as it is before an engine wraps it. compute_loss: the loss of inputs, as training computes it. stops: whether
    what is only suspicious ends the run. starts_anew: whether no earlier run is continued.
    row_of: the number of a row of the training data, given its tokens without padding, or None.
    """

    model: nn.Module
    config: ChatGLMConfig
    accelerator: Accelerator
    output_dir: Path
    stops: bool
    starts_anew: bool
    autocast: Callable[[], Any]
    compute_loss: Callable[[Mapping[str, Any]], Tensor]
    row_of: Callable[[Sequence[int]], int | None]
    save_adapter: Callable[[Path], None]


class Tripwires:
    """Watches the steps of one training run."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._around = surroundings
        self._micro_batches: list[MicroBatch] = []
        self._losses: list[Tensor] = []
        self._activations: dict[torch.device, Tensor] = {}
        self._steps_seen = 0
        self._first_loss = 0.0
        self._has_collapsed = False
        self._reached: set[str] = set()
        self._frozen: dict[str, tuple[int, Tensor]] | None = None
        self._hooks = [
            module.register_forward_hook(self._see_activations)
            for module in surroundings.model.modules()
            if isinstance(module, ChatGLMBlock)
        ]

    def end(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def before_micro_batch(self, inputs: Mapping[str, Any]) -> None:
        """Keep what the next forward pass is given, until the optimizer's step."""
        if self._frozen is None:  # only now: engines have placed the weights
            self._frozen = _frozen_samples(self._around.model)
        self._micro_batches.append(take_micro_batch(inputs))

    def after_micro_batch(self, loss: Tensor) -> None:
        """Keep the loss that it gave."""
        self._losses.append(loss.detach())

    def check_step(self, state: TrainerState, gradient_norm: Tensor | float | None) -> None:
        """Look at the step that the optimizer is about to take; called by all processes at once.

        gradient_norm: over all processes. Raises UserError where the run must not go on.
        """
        loss = torch.stack(self._losses).float().sum()
        is_bad = self._share(not self._is_finite(loss, gradient_norm))
        try:
            if is_bad:
                self._stop(state, float(loss), gradient_norm)
            if self._steps_seen < _STEPS_TO_COLLAPSE:
                self._check_loss(state, self._mean(loss))
        finally:
            self._micro_batches.clear()
            self._losses.clear()
            self._activations.clear()
        self._steps_seen += 1

    def check_frozen(self) -> None:
        """Raise UserError where a weight that is not trained has changed since `begin`."""
        now = _frozen_samples(self._around.model)
        changed = [
            name
            for name, (version, values) in (self._frozen or {}).items()
            if name in now and (now[name][0] != version or not _are_same_bits(now[name][1], values))
        ]
        if changed:
            raise UserError(
                f"{len(changed)} weights that are not trained have changed, {changed[0]} the first",
                code="T104",
                where=str(self._around.output_dir),
                remedy="use the base model as it was read: a callback, an optimizer or another library has written to "
                "it; results of this run are worth nothing",
            )

    def _see_activations(self, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if module.training:
            # A sum is not finite where one value is not; fp32, in which sums of half-precision values cannot overflow.
            total = output.detach().sum(dtype=torch.float32) * 0
            before = self._activations.get(output.device)
            self._activations[output.device] = total if before is None else before + total

    def _is_finite(self, loss: Tensor, gradient_norm: Tensor | float | None) -> bool:
        """Return whether all of this step is; a single wait for a GPU."""
        values = [loss, *(total.to(loss.device) for total in self._activations.values())]
        if gradient_norm is not None and not self._is_scaled():
            values.append(torch.as_tensor(gradient_norm, dtype=torch.float32, device=loss.device))
        return bool(torch.isfinite(torch.stack(values)).all())

    def _is_scaled(self) -> bool:
        """Whether fp16's loss scaling may still help: it skips steps that overflow, and scales the next ones less."""
        scaler = self._around.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def _has_deepspeed(self) -> bool:
        """Whether an engine holds the gradients and takes every backward pass."""
        return self._around.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _share(self, is_bad: bool) -> bool:
        """Return whether any process says so."""
        if self._around.accelerator.num_processes == 1:
            return is_bad
        flag: Any = torch.tensor(float(is_bad), device=self._around.accelerator.device)
        total: Any = self._around.accelerator.reduce(flag, reduction="sum")
        return float(total) > 0

    def _mean(self, loss: Tensor) -> float:
        """Return the loss per label token over all processes, of which each counts its part as if it were all."""
        if self._around.accelerator.num_processes > 1:
            whole: Any = self._around.accelerator.reduce(loss, reduction="mean")
            return float(whole)
        return float(loss)

    def _stop(self, state: TrainerState, loss: float, gradient_norm: Tensor | float | None) -> None:
        around = self._around
        step = state.global_step + 1
        logger.error("step %d: a number is not finite; its batch is computed again to find which", step)
        finding = None
        if not self._has_deepspeed():
            finding = find_first(around.model, self._micro_batches, around.compute_loss, around.autocast)
        process = around.accelerator.process_index
        found = [(finding, process)]
        if around.accelerator.num_processes > 1:
            found = gather_object(found)
        first, of_process = next((pair for pair in found if pair[0] is not None), (None, 0))
        folder = around.output_dir / f"stopped-at-step-{step}"
        if process == of_process:
            batches = self._micro_batches
            culprit = batches[0 if first is None or first.micro_batch is None else first.micro_batch]
            write_stopped_step(
                folder,
                StoppedStep(step, loss, None if gradient_norm is None else float(gradient_norm), first, of_process),
                culprit,
                around.row_of,
            )
            around.save_adapter(folder)
        around.accelerator.wait_for_everyone()
        raise UserError(_sentence(step, loss, first), code="T101", where=str(folder), remedy=_remedy(first, around))

    def _check_loss(self, state: TrainerState, loss: float) -> None:
        if self._steps_seen < _FIRST_STEPS:
            self._check_first_steps(state, loss)
        if self._steps_seen == 0:
            self._first_loss = loss
        elif not self._has_collapsed:
            step, stops = state.global_step + 1, self._around.stops
            self._has_collapsed = check_no_collapse(loss, self._first_loss, step, self._around.config, stops=stops)

    def _check_first_steps(self, state: TrainerState, loss: float) -> None:
        around = self._around
        if self._steps_seen:
            self.check_frozen()
        if loss == 0:
            raise UserError(
                f"the loss of step {state.global_step + 1} is exactly 0: there is nothing to learn in its rows, or the "
                "numbers of the model have collapsed",
                code="T105",
                where=str(around.output_dir),
                remedy="see what `chatglm-tuning data check` says of the data, and `chatglm-tuning verify` of the base",
            )
        if self._steps_seen == 0 and around.starts_anew:
            check_first_loss(loss, around.config, stops=around.stops)
        self._check_gradients(is_last=self._steps_seen == _FIRST_STEPS - 1 or state.global_step + 1 == state.max_steps)

    def _check_gradients(self, *, is_last: bool) -> None:
        """Stop where no gradient reaches anything trained; after the first steps, where one part is never reached."""
        around = self._around
        if self._has_deepspeed():
            return
        parts = {_part_of(name) for name, parameter in around.model.named_parameters() if parameter.requires_grad}
        self._reached |= {
            _part_of(name)
            for name, parameter in around.model.named_parameters()
            if parameter.requires_grad and parameter.grad is not None and float(parameter.grad.norm()) != 0
        }
        dead = sorted(parts - self._reached)
        if not dead or (self._reached and not is_last) or self._is_scaled():
            return
        tell(
            f"no gradient reaches {len(dead)} of the {len(parts)} parts that are trained, {dead[0]} the first",
            "use --activation_checkpointing off and no callbacks of your own; where some parts are meant to rest, pass "
            "--tripwires warn",
            code="T108",
            stops=around.stops or not self._reached,
            where=str(around.output_dir),
        )


def _part_of(parameter: str) -> str:
    """Return what a parameter is trained with: of a LoRA its linear, since one of two matrices starts at 0."""
    return parameter.partition(".lora_")[0]


def _are_same_bits(some: Tensor, others: Tensor) -> bool:
    """Return whether two tensors are the same to the bit: a NaN equals no number, itself included."""
    return torch.equal(some.view(torch.uint8), others.view(torch.uint8))


def _frozen_samples(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Return of every frozen parameter how often it was written to, and values spread over it, on the CPU."""
    samples = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        held = getattr(parameter, "ds_tensor", parameter).detach()  # of ZeRO-3, this process's part
        values = getattr(held, "to_local", lambda held=held: held)().reshape(-1)  # of a sharded one, what is here
        stride = max(1, values.numel() // _SAMPLED_VALUES)
        # What an engine shares out it also writes to, whenever it gathers and frees it.
        is_shared_out = type(held) is not Tensor or hasattr(parameter, "ds_id")
        version = 0 if is_shared_out else parameter._version
        samples[name] = (version, values[::stride].cpu().clone())
    return samples


def _sentence(step: int, loss: float, finding: Finding | None) -> str:
    if finding is None:
        return (
            f"at step {step} a number is not finite (the loss is {loss:g}), and computed again it is: it came from "
            "adding up gradients, or from faulty hardware"
        )
    return f"at step {step} the first number that is not finite is in {finding.describe()} (the loss is {loss:g})"


def _remedy(finding: Finding | None, around: Surroundings) -> str:
    if finding is not None and finding.kind == "parameter" and ("lora_" in finding.name or "prefix" in finding.name):
        cause = "lower --learning_rate"
    elif finding is not None and finding.kind == "parameter":
        cause = "copy the base model again: `chatglm-tuning verify` says which of its files differ"
    elif around.config.dtype == torch.float16:
        cause = "compute in bfloat16 or float32 (--dtype): float16 ends at 65504"
    else:
        cause = "lower --learning_rate, or look at the rows of the batch"
    whole = next(whole_checkpoints(around.output_dir), None)
    go_on = "start again" if whole is None else f"go on from {whole.name}"
    return f"{cause}, and {go_on}. The batch is in this folder, and `chatglm-tuning verify` repeats it"
