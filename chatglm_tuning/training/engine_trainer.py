"""transformers' Trainer on several processes: what its engines leave open about batches, checkpoints and CPUs."""

from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from chatglm_tuning.checkpoint import LORA_FILE, PREFIX_FILE
from chatglm_tuning.shards import find_weight_files, iterate_tensors
from chatglm_tuning.training.optimizer_state import check_values, find_layout, load_apart
from chatglm_tuning.training.resumed import OPTIMIZER_FILES
from chatglm_tuning.training.sharded import gather, set_values, shard_again, shard_on_cpu
from chatglm_tuning.training.shared_batches import SharedBatchSampler
from chatglm_tuning.training.state_files import read_state, told_state


class EngineTrainer(Trainer):
    """A Trainer whose checkpoints hold whole tensors, whichever engine has shared out the weights."""

    def create_accelerator_and_postprocess(self) -> None:
        """Create it; FSDP2 is for CPUs too."""
        super().create_accelerator_and_postprocess()
        if shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args):
            self.is_fsdp_enabled = True

    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _shared(self, rows: Any, batch_size: int) -> Any:
        """Return `rows`, an order of row numbers; where there are several processes, the batches of this one."""
        if self.args.world_size == 1:
            return rows
        return SharedBatchSampler(
            rows,
            batch_size,
            processes=self.args.world_size,
            process=self.args.process_index,
            drops_last=self.args.dataloader_drop_last,
        )

    def _run_epoch(self, *, epoch: int, train_dataloader: Any, **rest: Any) -> Any:
        # Neither accelerate nor Trainer reaches the order of a resumed epoch behind the two wrappers that it has on
        # several processes; it would be that of epoch 0.
        order = train_dataloader.batch_sampler
        while order is not None and not hasattr(order, "set_epoch"):
            order = getattr(order, "batch_sampler", None) or getattr(order, "sampler", None)
        if order is not None:
            order.set_epoch(epoch)
        return super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **rest)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; what that has gathered of the weights is shared out again."""
        metrics = super().evaluate(*args, **kwargs)
        assert self.model is not None
        shard_again(self.model)
        return metrics

    def gather_trained(self) -> dict[str, Tensor] | None:
        """Return in the first process what is trained, whole, where an engine may have shared it out; else None.

        Called by all processes at once.
        """
        assert self.model is not None
        return gather(self.model) if self._is_sharded() else None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained, gathered where it is shared out."""
        if self._is_sharded():
            self._save(output_dir, self.gather_trained())
        else:
            super().save_model(output_dir, _internal_call)

    def _load_states(self, checkpoint: str | None) -> None:
        """Load the optimizer and its schedule, once their values are seen to be of the parameters that are trained."""
        engine = "fsdp" if self.is_fsdp_enabled else "plain"
        file = None if checkpoint is None else Path(checkpoint) / OPTIMIZER_FILES[engine]
        layout = find_layout(self.args)
        if checkpoint is None or file is None or self.is_deepspeed_enabled or layout is None or not file.is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, schedule = cast("Any", self.optimizer), cast("Any", self.lr_scheduler)
        state = read_state(file)
        with told_state(file):
            check_values(state, layout, self._trained_by_name() if engine == "fsdp" else _by_number(optimizer))
        if engine == "fsdp":
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_apart(optimizer, state)
        schedule.load_state_dict(read_state(Path(checkpoint) / SCHEDULER_NAME))

    def _trained_by_name(self) -> dict[str, Tensor]:
        assert self.model is not None
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would write the weights a second time, in FSDP's own form.
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)


def _by_number(optimizer: Any) -> dict[int, Tensor]:
    """Return the parameters of an optimizer as its state counts them."""
    return dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))


def set_from_folder(model: nn.Module, folder: Path) -> None:
    """Set what is trained of a model that FSDP has shared out to its values in `folder`, a checkpoint of ours."""
    for name in (LORA_FILE, PREFIX_FILE):
        if (folder / name).is_file():
            set_values(model, load_file(folder / name))
            return
    set_values(model, {stored.key: stored.tensor for stored in iterate_tensors(find_weight_files(folder))})
