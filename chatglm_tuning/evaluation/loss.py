"""The loss of every prompt's references: what training reports as eval_loss, prompt by prompt."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from chatglm_tuning.data.collate import PrefixLMCollator
from chatglm_tuning.data.encode import IGNORED_LABEL, EncodingSettings, encode_examples
from chatglm_tuning.data.records import Example
from chatglm_tuning.evaluation.answers import plan_batches
from chatglm_tuning.evaluation.progress import showing_progress
from chatglm_tuning.evaluation.prompts import Prompt
from chatglm_tuning.model import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_tuning.model.loss import summed_cross_entropy


@dataclass(frozen=True)
class PromptLosses:
    """sums: the loss summed over the label tokens of a prompt's references; tokens: how many; both `(prompts,)`."""

    sums: np.ndarray
    tokens: np.ndarray

    @property
    def per_token(self) -> float:
        """The mean over all label tokens."""
        return float(self.sums.sum() / self.tokens.sum())


def measure_losses(
    model: nn.Module,
    tokenizer: ChatGLMTokenizer,
    prompts: Sequence[Prompt],
    settings: EncodingSettings,
    batch_size: int,
    *,
    show_progress: bool = False,
) -> PromptLosses:
    """Return the losses of all references of `prompts` under `model`, a base with or without an adapter."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    owners = [index for index, prompt in enumerate(prompts) for _ in prompt.references]
    examples = [
        Example(prompt.query, reference, prompt.history) for prompt in prompts for reference in prompt.references
    ]
    encoded = encode_examples(examples, tokenizer, settings)
    collate = PrefixLMCollator(tokenizer.pad_token_id)
    sums, tokens = np.zeros(len(prompts)), np.zeros(len(prompts), dtype=np.int64)
    showing = showing_progress("measuring the loss", "rows", len(encoded)) if show_progress else nullcontext(_ignore)
    with showing as advance:
        for indices in plan_batches([len(row.input_ids) for row in encoded], batch_size):
            rows = [{"input_ids": encoded[index].input_ids, "labels": encoded[index].labels} for index in indices]
            for index, (loss, count) in zip(indices, _row_losses(base, collate(rows)), strict=True):
                sums[owners[index]] += loss
                tokens[owners[index]] += count
            advance(len(indices))
    return PromptLosses(sums, tokens)


def _ignore(_count: int) -> None:
    """Stands for progress that is not shown."""


@torch.no_grad()
def _row_losses(base: ChatGLMForConditionalGeneration, batch: dict[str, Tensor]) -> list[tuple[float, int]]:
    """Return the summed loss and the label tokens of each row; only labelled positions meet the head."""
    head = base.lm_head.get_parameter("weight")
    batch = {name: tensor.to(head.device) for name, tensor in batch.items()}
    outputs = base.transformer(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    found = []
    for states, labels in zip(outputs.last_hidden_state, batch["labels"], strict=True):
        targets = labels[1:]
        labelled = targets != IGNORED_LABEL
        loss = summed_cross_entropy(states[:-1][labelled].to(head.device), head, targets[labelled], 0.0)
        found.append((loss.item(), int(labelled.sum())))
    return found
