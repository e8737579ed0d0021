"""How long examples are in tokens, and what limits on the lengths would do to them."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np

from chatglm_tuning.data.encode import TextEncoder
from chatglm_tuning.data.records import Example

# [gMASK] ends the prompt; <sop> begins an answer and <eop> ends it.
PROMPT_EXTRA, ANSWER_EXTRA = 1, 2
_AT_ONCE = 1000


@dataclass(frozen=True)
class Lengths:
    """Tokens of every prompt and answer with their special tokens, each `(examples,)`."""

    prompts: np.ndarray
    answers: np.ndarray


@dataclass(frozen=True)
class Limits:
    """Tokens allowed, and the shares (0 to 1) of the examples whose prompt or answer, or either, is longer."""

    max_input_length: int
    max_output_length: int
    cut_prompts: float
    cut_answers: float
    cut: float


def count_tokens(examples: Iterable[Example], tokenizer: TextEncoder) -> Lengths:
    """Count the tokens of prompts, history included, and answers."""
    prompts: list[int] = []
    answers: list[int] = []
    stream = iter(examples)
    while batch := list(islice(stream, _AT_ONCE)):
        prompts += [len(ids) + PROMPT_EXTRA for ids in tokenizer.encode_texts([example.prompt for example in batch])]
        answers += [len(ids) + ANSWER_EXTRA for ids in tokenizer.encode_texts([example.answer for example in batch])]
    return Lengths(np.asarray(prompts), np.asarray(answers))


def limits_at(lengths: Lengths, max_input_length: int, max_output_length: int) -> Limits:
    """Say what these limits cut."""
    prompts, answers = lengths.prompts > max_input_length, lengths.answers > max_output_length
    return Limits(
        max_input_length,
        max_output_length,
        float(prompts.mean()),
        float(answers.mean()),
        float((prompts | answers).mean()),
    )


def limits_that_cut(lengths: Lengths, share: float) -> Limits:
    """Return the smallest limits, each side alike, under which at most `share` (0 to 1) of the examples are cut."""
    allowed = int(share * len(lengths.prompts))
    prompts, answers = np.sort(lengths.prompts)[::-1], np.sort(lengths.answers)[::-1]
    for on_each_side in range(allowed, -1, -1):
        found = limits_at(lengths, int(prompts[on_each_side]), int(answers[on_each_side]))
        if found.cut * len(prompts) <= allowed:
            return found
    raise AssertionError("limits at the longest cut none")
