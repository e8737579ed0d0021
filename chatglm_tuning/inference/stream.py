"""One answer as a stream of token ids: transformers' `generate` in a worker thread, read a token at a time."""

import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from chatglm_tuning.errors import UserError
from chatglm_tuning.inference.cache import make_cache

# One thread for all answers: sampling draws from torch's global generator, where two would spoil each other's seed.
_WORKER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How tokens are drawn.

    max_length: tokens of prompt and answer together.
    do_sample: draw from the distribution; False takes the likeliest token, and all but max_length is unused.
    top_k: draw from that many likeliest tokens; transformers 4.28, which the released chat left this to, took 50.
    seed: torch is seeded with it before the first token, or not at all where None.
    """

    max_length: int
    do_sample: bool
    temperature: float
    top_p: float
    top_k: int = 50
    seed: int | None = None

    def generate_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of `generate` that these settings are."""
        if not self.do_sample:
            return {"max_length": self.max_length, "do_sample": False}
        return {
            "max_length": self.max_length,
            "do_sample": True,
            "temperature": float(self.temperature),  # transformers takes no whole number
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


def never() -> bool:
    """A `stop` that lets the answer end by itself."""
    return False


def stream_tokens(
    model: Any, input_ids: Tensor, *, settings: GenerationSettings, stop: Callable[[], bool] = never
) -> Generator[int, None, None]:
    """Yield the answer's token ids as they are drawn, every one but the final <eop>: those of `model.generate`.

    input_ids: `(1, seq)`, long, on the model's device; a whole prompt that ends with [gMASK] <sop>.
    stop: asked often, from two threads; once it is true no more tokens come. Closing the iterator does the same. The
        forward pass that is under way then ends in the background, and a next answer begins after it.
    Raises UserError where the model computes NaN or infinite logits, and whatever else `generate` raises.
    """
    tokens = _TokenQueue()
    is_abandoned = threading.Event()
    answer = _WORKER.submit(_generate, model, input_ids, settings, tokens, lambda: is_abandoned.is_set() or stop())
    answer.add_done_callback(lambda _: tokens.close())
    try:
        while (token := tokens.take(stop)) is not None:
            if token != model.config.eos_token_id:
                yield token
        if answer.done():
            answer.result()
    finally:
        is_abandoned.set()


def _generate(
    model: Any, input_ids: Tensor, settings: GenerationSettings, tokens: "_TokenQueue", stop: Callable[[], bool]
) -> None:
    if stop():
        return
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        use_cache=True,
        past_key_values=make_cache(),
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        logits_processor=LogitsProcessorList([FiniteLogits()]),
        stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
        streamer=tokens,
        **settings.generate_arguments(),
    )


class _TokenQueue(BaseStreamer):
    """Hands tokens from the thread that generates (`put`) to the one that reads (`take`)."""

    def __init__(self) -> None:
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        """Take what `generate` gives out: first the prompt, `(1, seq)`, then each new token, `(1,)`."""
        if self._is_prompt:
            self._is_prompt = False
            return
        for token in value.tolist():
            self._tokens.put(token)

    def end(self) -> None:
        """Nothing: `generate` does not come here where it raises, so whoever started it calls `close`."""

    def close(self) -> None:
        """Say that no token follows."""
        self._tokens.put(None)

    def take(self, stop: Callable[[], bool]) -> int | None:
        """Wait for the next token; None after the last one and as soon as `stop` is true."""
        while not stop():
            try:
                return self._tokens.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
        return None


class _Stop(StoppingCriteria):
    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._stop(), dtype=torch.bool, device=input_ids.device)


class FiniteLogits(LogitsProcessor):
    """`refuse_nan` at every token of `generate`."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        refuse_nan(scores, input_ids.shape[1])
        return scores


def refuse_nan(scores: Tensor, tokens: int) -> None:
    """Raise UserError for NaN and infinite logits, which the released chat hid by answering with token 5 for ever.

    tokens: of the conversation so far.
    """
    if not torch.isfinite(scores.max()):  # the maximum of a row with NaN is NaN
        raise UserError(
            f"the model computed NaN or infinite logits for token {tokens} of the conversation",
            code="T102",
            remedy="Compute in a wider type with --dtype float32 or --dtype bfloat16; if that gives the same, the "
            "weights or the adapter are damaged",
        )
