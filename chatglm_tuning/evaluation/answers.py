"""Many prompts answered in batches by transformers' `generate`: left-padded, of like length, with a cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import LogitsProcessorList

from chatglm_tuning.data.collate import PrefixLMCollator
from chatglm_tuning.inference.cache import make_cache
from chatglm_tuning.inference.stream import FiniteLogits
from chatglm_tuning.model.tokenization import ChatGLMTokenizer
from chatglm_tuning.prompt import process_response

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Answer:
    """finish_reason: `stop` where the model wrote <eop>, `length` where its answer was as long as it may be."""

    prediction: str
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How answers are drawn.

    max_output_length: tokens of an answer with <sop> and <eop>, as in training.
    do_sample: False takes the likeliest token, and all below is unused.
    seed: every batch is drawn with a seed of its own, made of this one and the batch's number.
    """

    max_output_length: int
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def generate_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `generate` that these settings are."""
        arguments: dict[str, Any] = {"max_new_tokens": self.max_output_length - 1, "do_sample": self.do_sample}
        if self.do_sample:
            arguments |= {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": self.top_k}
        return arguments


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices of prompts of these lengths in batches: longest first, so that a lack of memory shows early.

    It depends on nothing but its arguments, so that a run that is resumed makes the same batches.
    """
    by_length = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]


def answer_batch(
    model: Any, tokenizer: ChatGLMTokenizer, prompts: Sequence[Sequence[int]], drawing: Drawing, number: int = 0
) -> list[Answer]:
    """Answer one batch.

    prompts: ids of whole prompts that end with [gMASK] <sop>. number: of the batch, for its seed.
    Raises UserError where the model computes NaN or infinite logits.
    """
    if drawing.do_sample:
        seed = np.random.SeedSequence([drawing.seed, number]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed))
    batch = PrefixLMCollator(tokenizer.pad_token_id, "left")([{"input_ids": ids, "labels": ids} for ids in prompts])
    width = batch["input_ids"].shape[1]
    ids = model.generate(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        use_cache=True,
        past_key_values=make_cache(),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([FiniteLogits()]),
        **drawing.generate_arguments(),
    )
    return [_read(tokenizer, row) for row in ids[:, width:].tolist()]


def answer_all(
    model: Any, tokenizer: ChatGLMTokenizer, prompts: Sequence[Sequence[int]], drawing: Drawing, batch_size: int
) -> list[Answer]:
    """Answer all prompts, in their order; arguments are those of `answer_batch`."""
    answers: dict[int, Answer] = {}
    for number, indices in enumerate(plan_batches([len(ids) for ids in prompts], batch_size)):
        batch = answer_batch(model, tokenizer, [prompts[index] for index in indices], drawing, number)
        answers.update(zip(indices, batch, strict=True))
    return [answers[index] for index in range(len(prompts))]


def _read(tokenizer: ChatGLMTokenizer, ids: list[int]) -> Answer:
    is_finished = tokenizer.eos_token_id in ids
    written = ids[: ids.index(tokenizer.eos_token_id)] if is_finished else ids
    text = tokenizer.decode(written, skip_special_tokens=True)
    assert isinstance(text, str)
    # The bytes of a character that the limit cut are no text.
    return Answer(process_response(text.rstrip("\ufffd")), "stop" if is_finished else "length")
