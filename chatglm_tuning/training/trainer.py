"""transformers' Trainer with ChatGLM's loss, length buckets, token-weighted evaluation and adapter checkpoints."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from chatglm_tuning.checkpoint import (
    Manifest,
    save_adapter_files,
    save_full_files,
    step_of_checkpoint,
    write_manifest,
)
from chatglm_tuning.data.collate import LengthBucketSampler
from chatglm_tuning.proof import Proof, prove
from chatglm_tuning.training.best import Places, choose_best, untold_absence
from chatglm_tuning.training.checkpoints import (
    PART_NAME,
    load_adapter_values,
    put_in_place,
    refuse_unproved,
    tell_proof,
)
from chatglm_tuning.training.engine_trainer import EngineTrainer, set_from_folder
from chatglm_tuning.training.manifest import with_progress
from chatglm_tuning.training.token_budget import TokenBudgetSampler
from chatglm_tuning.training.tripwires import Surroundings, Tripwires

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossSettings:
    """average: `tokens` (every label token of an optimizer step weighs the same) or `micro_batches` (the mean of the
    micro-batches' means, as the original had it). smoothing: label smoothing.
    """

    average: str = "tokens"
    smoothing: float = 0.0


@dataclass(frozen=True)
class BatchSettings:
    """by_length: whether a micro-batch holds rows of like length. max_tokens: what it holds at most, None = a fixed
    number of rows.
    """

    by_length: bool = True
    max_tokens: int | None = None


class TuningTrainer(EngineTrainer):
    """Trains LoRA, a prefix or a whole model.

    train_dataset and eval_dataset: columns input_ids, labels, length.
    manifest: what checkpoints say of themselves; loss: how it is averaged; batches: which rows share one;
        checkpoint_limit: checkpoints that are kept, None = all (`args.save_total_limit` must be None: an old
        checkpoint goes only after the new one is whole); score_answers: what an evaluation measures beside the loss,
        called in every process at once; stops_on_suspicion: whether what similar runs do not show ends the run.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        manifest: Manifest,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        data_collator: Callable[[Any], dict[str, Tensor]],
        loss: LossSettings,
        batches: BatchSettings,
        checkpoint_limit: int | None,
        callbacks: list[Any],
        score_answers: Callable[[nn.Module], dict[str, float]] | None = None,
        stops_on_suspicion: bool = True,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = loss.average == "tokens"
        self._loss = loss
        self._manifest = manifest
        self._batches = batches
        self._checkpoint_limit = checkpoint_limit
        self._score_answers = score_answers
        self._stops_on_suspicion = stops_on_suspicion
        self._part_folder: str | None = None
        self._tripwires: Tripwires | None = None
        self._places = Places(Path(str(args.output_dir)))
        self.loaded_step: int | None = None
        """Of the checkpoint whose values were loaded as the result."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does, with every step watched by tripwires."""
        self._tripwires = Tripwires(self._surroundings(starts_anew=resume_from_checkpoint is None))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._tripwires.end()
            self._tripwires = None

    def _surroundings(self, *, starts_anew: bool) -> Surroundings:
        model = self._model_itself()

        def compute_loss(inputs: Mapping[str, Any]) -> Tensor:
            prepared = self._prepare_inputs(dict(inputs))
            return model(**prepared, return_logits=False, use_cache=False, label_smoothing=self._loss.smoothing).loss

        return Surroundings(
            model,
            cast("Any", model).config,
            self.accelerator,
            Path(str(self.args.output_dir)),
            stops=self._stops_on_suspicion,
            starts_anew=starts_anew,
            autocast=self.compute_loss_context_manager,
            compute_loss=compute_loss,
            row_of=self._row_of,
            save_adapter=self._save_stopped,
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._load_states(checkpoint)
        if checkpoint is None or not isinstance(self.lr_scheduler, LambdaLR) or self.is_deepspeed_enabled:
            return
        # A checkpoint holds the rate and the schedule's length of the run that wrote it; these are this run's.
        schedule, optimizer = self.lr_scheduler, cast("Any", self.optimizer)
        schedule.base_lrs = [self.args.learning_rate] * len(schedule.base_lrs)
        schedule._last_lr = [self.args.learning_rate * factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
            group["initial_lr"], group["lr"] = self.args.learning_rate, rate

    def _row_of(self, tokens: Sequence[int]) -> int | None:
        """Return the number, from 1, of the first training row of these tokens."""
        dataset: Any = self.train_dataset
        for index in np.flatnonzero(np.asarray(dataset["length"]) == len(tokens)).tolist():
            if dataset[index]["input_ids"] == list(tokens):
                return index + 1
        return None

    def _save_stopped(self, folder: Path) -> None:
        if self._manifest.method != "full" and not self._is_sharded():
            save_adapter_files(self._model_itself(), folder, for_original=False)
            write_manifest(folder, self._manifest, [path.name for path in folder.iterdir() if path.is_file()])

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Compute the gradients of one micro-batch, which the tripwires keep until the optimizer's step."""
        assert self._tripwires is not None
        self._tripwires.before_micro_batch(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._tripwires.after_micro_batch(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Trainer asks between the last gradient of a step and the optimizer.
        norm = super()._get_grad_norm(model, grad_norm)
        assert self._tripwires is not None
        self._tripwires.check_step(self.state, norm)
        return norm

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Ask the model for the loss alone: only labelled positions meet the language-model head."""
        inputs = {**inputs, "return_logits": False, "label_smoothing": self._loss.smoothing}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset: Any = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.train_sampling_strategy == "sequential":
            return self._shared(range(len(dataset)), self.args.train_batch_size)
        if not self._batches.by_length:
            return super()._get_train_sampler(dataset)
        if self._batches.max_tokens is not None:
            return TokenBudgetSampler(
                dataset["length"],
                self._batches.max_tokens,
                seed=self.args.seed,
                processes=self.args.world_size,
                process=self.args.process_index,
            )
        group = self.args.train_batch_size * self.args.world_size
        rows = LengthBucketSampler(dataset["length"], group, seed=self.args.seed)
        return self._shared(rows, self.args.train_batch_size)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the rows of an optimizer step, of a token budget their mean; Trainer reports its speed by it."""
        sampler = None if self._batches.max_tokens is None else self._get_train_sampler()
        if not isinstance(sampler, TokenBudgetSampler):
            return super().get_total_train_batch_size(args)
        dataset: Any = self.train_dataset
        return max(1, round(len(dataset) / len(sampler) * args.gradient_accumulation_steps))

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Any:
        # Rows of like length together, longest first; the loss is weighed by tokens, so the order changes nothing.
        lengths = torch.as_tensor(eval_dataset["length"])
        return self._shared(lengths.argsort(descending=True, stable=True).tolist(), self.args.eval_batch_size)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the mean loss over all label tokens, whatever the batches are."""
        model = self._wrap_model(self._model_itself(), training=False)
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # summed loss, label tokens
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                summed = model(**inputs, return_logits=False, use_cache=False, num_items_in_batch=1).loss
            totals += torch.stack([summed.double(), (inputs["labels"][:, 1:] != -100).sum().double()])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        reduced: Any = self.accelerator.reduce(totals, reduction="sum")
        loss, tokens = reduced.tolist()
        rows = self.num_examples(dataloader)
        metrics = {f"{metric_key_prefix}_loss": loss / max(tokens, 1), f"{metric_key_prefix}_label_tokens": int(tokens)}
        if self._score_answers is not None:
            with torch.no_grad(), self.compute_loss_context_manager():
                scores = self._score_answers(self.accelerator.unwrap_model(model))
            metrics |= {f"{metric_key_prefix}_{name}": score for name, score in scores.items()}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=rows)

    def _model_itself(self) -> nn.Module:
        assert self.model is not None  # only a Trainer with model_init has none yet
        return self.model

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        if self._manifest.method == "full":
            save_full_files(self._model_itself(), folder, state_dict)
        else:
            save_adapter_files(self._model_itself(), folder, for_original=False, state=state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        return self._part_folder or super()._get_output_dir(trial=trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its place, make it whole, put it there, and only then let older ones go."""
        run_folder = Path(super()._get_output_dir(trial=trial))
        part = run_folder / PART_NAME
        name = f"checkpoint-{self.state.global_step}"
        assert self._tripwires is not None
        self._tripwires.check_frozen()
        if self.args.should_save:  # what an earlier run left half-written
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._part_folder = str(part)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._finish_checkpoint(part / name, run_folder / name)
        finally:
            self._part_folder = None
            if self.args.should_save:
                shutil.rmtree(part, ignore_errors=True)
        if not self.args.should_save:
            return
        rotate_checkpoints(
            output_dir=str(run_folder),
            save_total_limit=self._checkpoint_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=False,
        )

    def _finish_checkpoint(self, written: Path, place: Path) -> None:
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(place)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        proof = self.prove_saved(written)
        if proof is not None:
            refuse_unproved(proof, place)
            tell_proof(proof, place, stops=False)
        progress = with_progress(self._manifest, self.state, self.args, result_step=self.state.global_step)
        put_in_place(written, place, progress, proof)

    def prove_saved(self, folder: Path) -> Proof | None:
        """Return the proof that the adapter in `folder` is the live one; None where that cannot be seen here."""
        return None if self._manifest.method == "full" or self._is_sharded() else prove(self._model_itself(), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            set_from_folder(self._model_itself(), Path(resume_from_checkpoint))
        elif self._manifest.method == "full":
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter_values(self._model_itself() if model is None else model, Path(resume_from_checkpoint))

    def _init_training_state(
        self, max_steps: int, steps_of_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        with untold_absence():
            position = super()._init_training_state(max_steps, steps_of_epoch, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is not None:
            self._places = self._places.going_on_from(Path(resume_from_checkpoint), self.state.global_step)
            # All of a full model's bytes are read only at the end.
            verifies = self._manifest.method != "full"
            choose_best(self.state, replace(self._places, verifies_files=verifies), self.args)
        return position

    def _load_best_model(self) -> None:
        if (best := choose_best(self.state, self._places, self.args)) is not None:
            self.load_values(best)

    def set_values(self, checkpoint: Path) -> None:
        """Set what is trained to its values in `checkpoint`, one of this run."""
        self._load_from_checkpoint(str(checkpoint))

    def load_values(self, checkpoint: Path) -> None:
        """Set what is trained to its values in `checkpoint`, which are the result."""
        logger.info("the result is that of %s, the best checkpoint", checkpoint)
        self.set_values(checkpoint)
        self.loaded_step = step_of_checkpoint(checkpoint)
