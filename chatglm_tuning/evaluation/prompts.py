"""The prompts of data files: each once, with every answer that the files have for it, and as tokens."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from chatglm_tuning.data.encode import TextEncoder, fit_history
from chatglm_tuning.data.records import Example
from chatglm_tuning.prompt import Round, build_prompt


@dataclass(frozen=True)
class Prompt:
    """What is asked, and its answers in the order of the data. history: (question, answer) rounds, oldest first."""

    query: str
    references: tuple[str, ...]
    history: tuple[Round, ...] = ()

    @property
    def text(self) -> str:
        """What the model reads."""
        return build_prompt(self.query, self.history)


def group_prompts(examples: Sequence[Example]) -> list[Prompt]:
    """Return the distinct prompts of `examples`, in the order in which they come first."""
    answers: dict[tuple[str, tuple[Round, ...]], list[str]] = {}
    for example in examples:
        references = answers.setdefault((example.query, example.history), [])
        if example.answer:  # a row may be a prompt alone
            references.append(example.answer)
    return [Prompt(query, tuple(references), history) for (query, history), references in answers.items()]


def digest_prompts(prompts: Sequence[Prompt]) -> str:
    """Return a SHA-256 of all that prompts say, whatever file and shape they came from."""
    content = [[prompt.query, prompt.history, prompt.references] for prompt in prompts]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def encode_prompt(prompt: Prompt, tokenizer: TextEncoder, max_input_length: int) -> list[int]:
    """Return the ids of a prompt with [gMASK] <sop>, shortened as training shortens it.

    max_input_length: tokens of the prompt with [gMASK]. What is too long loses its oldest rounds, then its end.
    """
    return shorten_prompt(prompt, tokenizer, max_input_length)[0]


def shorten_prompt(prompt: Prompt, tokenizer: TextEncoder, max_input_length: int) -> tuple[list[int], bool]:
    """Return the ids that `encode_prompt` makes, and whether anything of the prompt was cut."""
    room = max_input_length - 1
    (ids,) = tokenizer.encode_texts([prompt.text])
    is_cut = len(ids) > room
    if prompt.history and is_cut:
        fitting = fit_history(prompt.query, prompt.history, room, lambda text: len(tokenizer.encode_texts([text])[0]))
        (ids,) = tokenizer.encode_texts([build_prompt(prompt.query, fitting)])
    return [*ids[:room], tokenizer.gmask_token_id, tokenizer.bos_token_id], is_cut


def sample_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return `count` of `prompts`, or all where there are fewer, spread evenly over them and in their order."""
    if count >= len(prompts):
        return list(prompts)
    return [prompts[index * len(prompts) // count] for index in range(count)]
