"""transformers' Trainer with ChatGLM's loss, length buckets, token-weighted evaluation and adapter checkpoints."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from chatglm_tuning.adapters.ptuning import PREFIX_KEY, prefix_tensors
from chatglm_tuning.checkpoint import (
    LORA_FILE,
    MANIFEST_NAME,
    PREFIX_FILE,
    Manifest,
    save_adapter_files,
    save_full_files,
    step_of_checkpoint,
    write_manifest,
)
from chatglm_tuning.data.collate import LengthBucketSampler
from chatglm_tuning.training.manifest import with_progress
from chatglm_tuning.training.token_budget import TokenBudgetSampler

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


class TuningTrainer(Trainer):
    """Trains LoRA, a prefix or a whole model.

    train_dataset and eval_dataset: columns input_ids, labels, length.
    manifest: what checkpoints say of themselves; loss: how it is averaged; batches: which rows share one;
        checkpoint_limit: checkpoints that are kept, None = all (`args.save_total_limit` must be None: an old
        checkpoint goes only after the new one is whole); score_answers: what an evaluation measures beside the loss,
        called in every process at once.
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
        self.loaded_step: int | None = None
        """Of the checkpoint whose values were loaded as the result."""

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
        if not self._batches.by_length or self.args.train_sampling_strategy == "sequential":
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
        return LengthBucketSampler(dataset["length"], group, seed=self.args.seed)

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
        return lengths.argsort(descending=True, stable=True).tolist()

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
            save_adapter_files(self._model_itself(), folder, for_original=False)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint, make it whole by its manifest, and only then let older ones go."""
        run_folder = Path(self._get_output_dir(trial=trial))
        folder = run_folder / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():  # what an earlier run left half-written
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        names = [path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_NAME]
        progress = with_progress(self._manifest, self.state, self.args, result_step=self.state.global_step)
        write_manifest(folder, progress, names)
        rotate_checkpoints(
            output_dir=str(run_folder),
            save_total_limit=self._checkpoint_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=False,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._manifest.method == "full":
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter_values(self._model_itself() if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.load_values(Path(self.state.best_model_checkpoint))

    def load_values(self, checkpoint: Path) -> None:
        """Set what is trained to its values in `checkpoint`, one of this run."""
        logger.info("the result is that of %s, the best checkpoint", checkpoint)
        self._load_from_checkpoint(str(checkpoint))
        self.loaded_step = step_of_checkpoint(checkpoint)


def load_adapter_values(model: nn.Module, folder: Path) -> None:
    """Set the values of the adapter in `model` to those saved in `folder`, a checkpoint of ours of the same shape."""
    if isinstance(model, PeftModel):
        result = set_peft_model_state_dict(model, load_file(folder / LORA_FILE))
        assert not result.unexpected_keys, result.unexpected_keys
    else:
        encoder = model.get_submodule(PREFIX_KEY.removesuffix("."))
        encoder.load_state_dict(prefix_tensors(load_file(folder / PREFIX_FILE)))
