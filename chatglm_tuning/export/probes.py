"""What a model answers to fixed prompts: the greedy tokens, and the logits at each of them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatglm_tuning.data.records import read_records
from chatglm_tuning.inference.cache import make_cache
from chatglm_tuning.loading import Base
from chatglm_tuning.model import ChatGLMTokenizer

PROMPTS = (
    "你好",
    "类型#裤*版型#宽松*风格#简约",
    "写一段关于红色连衣裙的广告。",
    "请用三句话介绍一下北京的秋天。",
    "Hello, who are you?",
    "Write a short advert for a pair of loose trousers.",
    "What is the difference between cotton and linen?",
    "List three colours that go well with grey.",
)
_MOST_ROWS = 8
_LONGEST_PROMPT = 256


@dataclass(frozen=True)
class Probes:
    """Prompts of a batch, padded on the left. input_ids, attention_mask: `(rows, seq)`, long."""

    input_ids: Tensor
    attention_mask: Tensor
    own_rows: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Answers:
    """Greedy answers and what they were chosen from.

    tokens: `(rows, new)`, long. logits: `(rows, new, vocab)`, fp32; those at position t chose token t.
    is_answer: `(rows, new)`, true up to and with the first <eop>.
    """

    tokens: Tensor
    logits: Tensor
    is_answer: Tensor


def read_probe_texts(data_path: Sequence[Path]) -> list[str]:
    """Return the prompts of some rows, spread evenly over the files; raises UserError for rows that cannot be read."""
    if not data_path:
        return []
    prompts = list(dict.fromkeys(example.prompt for example in read_records(data_path).examples))
    count = min(_MOST_ROWS, len(prompts))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def encode_probes(tokenizer: ChatGLMTokenizer, own_texts: Sequence[str], max_sequence_length: int) -> Probes:
    """Encode the built-in prompts and `own_texts`, long ones cut, with [gMASK] <sop>."""
    room = min(_LONGEST_PROMPT, max_sequence_length // 2)
    special = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    rows = [[*tokenizer.encode_text(text)[:room], *special] for text in (*PROMPTS, *own_texts)]
    longest = max(map(len, rows))
    ids = [[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return Probes(torch.tensor(ids), torch.tensor(mask), len(own_texts))


def answer(model: nn.Module, probes: Probes, new_tokens: int) -> Answers:
    """Let `model`, on the CPU, answer the probes greedily."""
    generating: Any = model
    config = generating.config
    found = generating.generate(
        input_ids=probes.input_ids,
        attention_mask=probes.attention_mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        past_key_values=make_cache(),
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = found.sequences[:, probes.input_ids.shape[1] :]
    ends = (tokens == config.eos_token_id).int()
    is_answer = (ends.cumsum(dim=1) - ends) == 0
    return Answers(tokens, torch.stack(found.logits, dim=1).float(), is_answer)


@torch.no_grad()
def logits_along(model: nn.Module, probes: Probes, answers: Answers, *, without_adapter: bool = False) -> Tensor:
    """Return the logits `(rows, new, vocab)`, fp32, that `model` has along the tokens of `answers`."""
    tokens = answers.tokens
    ids = torch.cat([probes.input_ids, tokens], dim=1)
    mask = torch.cat([probes.attention_mask, torch.ones_like(tokens)], dim=1)
    running: Any = model
    aside: AbstractContextManager[Any] = running.disable_adapter() if without_adapter else nullcontext()
    with aside:
        logits = running(input_ids=ids, attention_mask=mask, logits_to_keep=tokens.shape[1] + 1).logits
    return logits[:, :-1].float()


def probes_of(base: Base, own_texts: Sequence[str]) -> Probes:
    """Return the probes in the tokens of a base."""
    return encode_probes(base.tokenizer, own_texts, base.config.max_sequence_length)
