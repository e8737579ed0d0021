"""Answers to many requests at once: rows join a running batch and leave it, each with an adapter of its own.

transformers' own continuous batching cannot serve this model: it knows one causal row of positions, where a prompt
here is read in both directions and has two rows of them.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache

from chatglm_tuning.adapters.served import BASE_ALONE, AdapterSet, ServedAdapter
from chatglm_tuning.errors import UserError
from chatglm_tuning.inference.cache import GrowingLayer, make_cache
from chatglm_tuning.inference.stream import GenerationSettings, never, refuse_nan
from chatglm_tuning.model.masks import build_position_ids

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error"]

_POLL_SECONDS = 0.05
# Prompts that are read together have at most so many tokens with their padding: more would gain little, take memory and
# keep the running answers waiting.
_TOKENS_READ_TOGETHER = 512


class QueueFullError(RuntimeError):
    """As many requests as may run and wait are under way."""


class EngineClosedError(RuntimeError):
    """The engine takes no requests any more."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer that is wanted.

    prompt_ids: a whole prompt that ends with [gMASK] <sop>.
    settings: with the same seed the same tokens are drawn whatever else is in the batch, but for rounding: a product
        of more rows may add its terms in another order.
    """

    prompt_ids: Sequence[int]
    settings: GenerationSettings
    adapter: ServedAdapter = BASE_ALONE


@dataclass(frozen=True)
class Finished:
    """The end of an answer. stop: the model wrote <eop>; length: `max_length` was reached."""

    reason: FinishReason
    error: Exception | None = None


Deliver = Callable[[int | Finished], None]


class Generation:
    """A request on its way through the engine."""

    def __init__(self, request: Request, deliver: Deliver) -> None:
        self.request = request
        self.deliver = deliver
        self._is_cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask for no more tokens; `Finished` still comes."""
        self._is_cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled.is_set()


class BatchEngine:
    """Runs a model in one thread for all requests.

    max_rows: answers that are drawn at the same time. max_waiting: requests that may wait for their turn.
    """

    def __init__(self, adapters: AdapterSet, *, max_rows: int = 16, max_waiting: int = 64) -> None:
        self._adapters = adapters
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._waiting: deque[Generation] = deque()
        self._under_way: set[Generation] = set()
        self._batch = _RunningBatch(adapters)
        self._condition = threading.Condition()
        self._model_lock = threading.Lock()
        self._pauses = 0
        self._is_closing = self._drains = False
        self._drawn_tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that are being drawn."""
        return len(self._batch.rows)

    @property
    def waiting(self) -> int:
        """Requests whose prompt has not been read yet."""
        return len(self._waiting)

    @property
    def capacity(self) -> int:
        """Answers that may be under way: drawn, or waiting for it."""
        return self._max_rows + self._max_waiting

    @property
    def drawn_tokens(self) -> int:
        """Tokens drawn since the start, <eop> included."""
        return self._drawn_tokens

    def submit(self, request: Request, deliver: Deliver) -> Generation:
        """Ask for an answer. `deliver` is called in the engine's thread: with every token, then with `Finished`.

        Raises QueueFullError and EngineClosedError.
        """
        [generation] = self.submit_all([(request, deliver)])
        return generation

    def submit_all(self, wanted: Sequence[tuple[Request, Deliver]]) -> list[Generation]:
        """Ask for several answers as `submit` does, for all of them or, where it raises, for none."""
        generations = [Generation(request, deliver) for request, deliver in wanted]
        with self._condition:
            if self._is_closing:
                raise EngineClosedError("the engine is shutting down")
            if len(self._under_way) + len(generations) > self.capacity:
                raise QueueFullError(f"{len(self._under_way)} requests are under way")
            self._under_way.update(generations)
            self._waiting.extend(generations)
            self._condition.notify()
        return generations

    @contextmanager
    def paused(self) -> Iterator[AdapterSet]:
        """Keep the model still, between two tokens, while an adapter is added to the set that this gives."""
        with self._condition:
            self._pauses += 1  # the engine's thread would take the lock again before anyone else
        try:
            with self._model_lock:
                yield self._adapters
        finally:
            with self._condition:
                self._pauses -= 1
                self._condition.notify()

    def close(self, *, drain_seconds: float | None = 0) -> None:
        """Take no more requests; wait that long (None: for ever) for those under way, and cancel the rest."""
        with self._condition:
            self._is_closing, self._drains = True, True
            self._condition.notify()
        self._thread.join(drain_seconds)
        with self._condition:
            self._drains = False
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait_for_work():
            self._let_go_of_waiting()
            with self._model_lock, torch.inference_mode():
                try:
                    self._admit()
                    self._step()
                except Exception as error:
                    self._fail_batch(error)
        for generation in [*self._waiting, *(row.generation for row in self._batch.rows)]:
            self._finish(generation, Finished("cancelled"))
        self._waiting.clear()
        self._batch.keep(lambda _row: False)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to compute; False once the engine is to end."""
        with self._condition:
            while self._pauses or not (self._waiting or self._batch.rows or self._is_closing):
                self._condition.wait()
            return bool(self._waiting or self._batch.rows) and (self._drains or not self._is_closing)

    def _let_go_of_waiting(self) -> None:
        """Take the cancelled ones out of the queue: they would keep others from it until a row becomes free."""
        with self._condition:
            cancelled = [generation for generation in self._waiting if generation.is_cancelled]
            for generation in cancelled:
                self._waiting.remove(generation)
        for generation in cancelled:
            self._finish(generation, Finished("cancelled"))

    def _admit(self) -> None:
        """Read the prompts of some that wait: those that run get their next token before more prompts are read."""
        if generations := self._take_waiting():
            self._begin(generations)

    def _take_waiting(self) -> list[Generation]:
        """Take those that have waited longest out of the queue: as many as have a row and are read together."""
        free = self._max_rows - len(self._batch.rows)
        taken: list[Generation] = []
        longest = 0
        with self._condition:
            while self._waiting and len(taken) < free:
                longest = max(longest, len(self._waiting[0].request.prompt_ids))
                if taken and (len(taken) + 1) * longest > _TOKENS_READ_TOGETHER:
                    break
                taken.append(self._waiting.popleft())
        return taken

    def _begin(self, generations: Sequence[Generation]) -> None:
        """Read the prompts and draw the first token of every answer; those that go on join the batch."""
        try:
            rows, sources, logits = self._read_prompts(generations)
        except Exception as error:
            if len(generations) == 1:
                _log_unless_told(error)
                self._finish(generations[0], Finished("error", error))
                return
            for generation in generations:  # there may be no room for all, or something wrong with one
                self._begin([generation])
            return
        goes_on = [self._draw(row, of_row) for row, of_row in zip(rows, logits, strict=True)]
        self._batch.join(list(compress(rows, goes_on)), list(compress(sources, goes_on)))

    def _read_prompts(self, generations: Sequence[Generation]) -> tuple[list["_Row"], list["_Source"], Tensor]:
        """Return a row for each, where its keys and values stand, and the logits of its first token, `(rows, vocab)`.

        Prompts are padded at their left; prefixes, which stand in the cache before that, too.
        """
        model, requests = self._adapters.model, [generation.request for generation in generations]
        input_ids, mask = _pad_left([request.prompt_ids for request in requests], model)
        positions = build_position_ids(
            input_ids,
            mask,
            bos_token_id=model.config.bos_token_id,
            gmask_token_id=model.config.gmask_token_id,
            mask_token_id=model.config.mask_token_id,
        )
        cache, prefix_mask = _begin_cache([request.adapter.prefix for request in requests], model.device)
        mask = torch.cat([prefix_mask, mask], dim=1)
        outputs = model(
            input_ids=input_ids,
            position_ids=positions,
            attention_mask=None if mask.all() else mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **self._adapters.keywords([request.adapter for request in requests]),
        )
        rows, sources = [], []
        for index, (position, block) in enumerate(positions[:, :, -1].tolist()):
            kept = mask[index].nonzero()[:, 0]
            pick = make_picker(requests[index].settings, input_ids.device)
            rows.append(_Row(generations[index], pick, len(kept), position, block))
            sources.append(_Source(cache, index, kept))
        return rows, sources, outputs.logits[:, -1]

    def _step(self) -> None:
        self._batch.keep(lambda row: not self._ends_by_cancelling(row))
        if not self._batch.rows:
            return
        logits = self._batch.step()
        goes_on = {row: self._draw(row, of_row) for row, of_row in zip(self._batch.rows, logits, strict=True)}
        self._batch.keep(lambda row: goes_on[row])

    def _fail_batch(self, error: Exception) -> None:
        """End all rows, whose cache may be in pieces."""
        _log_unless_told(error)
        for row in self._batch.rows:
            self._finish(row.generation, Finished("error", error))
        self._batch.keep(lambda _row: False)

    def _ends_by_cancelling(self, row: "_Row") -> bool:
        if is_cancelled := row.generation.is_cancelled:
            self._finish(row.generation, Finished("cancelled"))
        return is_cancelled

    def _draw(self, row: "_Row", logits: Tensor) -> bool:
        """Draw the next token of `row` from `logits` `(vocab,)` and hand it out; whether another one follows."""
        request = row.generation.request
        try:
            refuse_nan(logits, len(request.prompt_ids) + row.drawn)
            token = row.pick(logits)
        except Exception as error:
            _log_unless_told(error)
            self._finish(row.generation, Finished("error", error))
            return False
        row.token, row.drawn = token, row.drawn + 1
        self._drawn_tokens += 1
        if token == self._adapters.model.config.eos_token_id:
            self._finish(row.generation, Finished("stop"))
            return False
        _hand_out(row.generation, token)
        if len(request.prompt_ids) + row.drawn >= request.settings.max_length:
            self._finish(row.generation, Finished("length"))
            return False
        return True

    def _finish(self, generation: Generation, finished: Finished) -> None:
        """Deliver the end of an answer, in whose place another one may be asked for from now on."""
        with self._condition:
            self._under_way.discard(generation)
        _hand_out(generation, finished)


@dataclass(eq=False)
class _Row:
    """A running answer. length: its cached tokens, prefix included; position and block: those of its last token."""

    generation: Generation
    pick: Callable[[Tensor], int]
    length: int
    position: int
    block: int
    token: int = -1
    drawn: int = 0


class _Source(NamedTuple):
    """Where a row's keys and values stand: those `kept` (indices, or a slice) of row `index` of a cache."""

    cache: Cache
    index: int
    kept: Tensor | slice


class _RunningBatch:
    """The rows that are drawn together and their cache, in which all of them end at the same place."""

    def __init__(self, adapters: AdapterSet) -> None:
        self.rows: list[_Row] = []
        self._adapters = adapters
        self._cache = make_cache()

    def join(self, rows: Sequence[_Row], sources: Sequence[_Source]) -> None:
        """Add rows, whose keys and values stand in `sources`."""
        if rows:
            self._gather([*self.rows, *rows], [*self._sources(), *sources])

    def keep(self, is_kept: Callable[[_Row], bool]) -> None:
        """Drop the other rows."""
        kept = [is_kept(row) for row in self.rows]
        if not all(kept):
            self._gather(list(compress(self.rows, kept)), list(compress(self._sources(), kept)))

    def _sources(self) -> list[_Source]:
        return [_Source(self._cache, index, slice(-row.length, None)) for index, row in enumerate(self.rows)]

    def _gather(self, rows: list[_Row], sources: list[_Source]) -> None:
        """Make one cache of the rows of others, a layer at a time, so that little is held twice."""
        self.rows, gathered = rows, make_cache()
        end = max((row.length for row in rows), default=0)
        for layer in range(len(sources[0].cache.layers) if sources else 0):
            both = []
            for name in ("keys", "values"):
                parts = [getattr(cache.layers[layer], name)[index] for cache, index, _ in sources]
                heads, _, head_dim = parts[0].shape
                joined = parts[0].new_zeros(len(rows), heads, end, head_dim)
                for target, row, part, source in zip(joined, rows, parts, sources, strict=True):
                    target[:, end - row.length :] = part[:, source.kept]
                both.append(joined)
            for cache, _, _ in sources:
                cache.layers[layer] = GrowingLayer()
            gathered.update(both[0], both[1], layer)
        self._cache = gathered

    def step(self) -> Tensor:
        """Read every row's last token; returns the logits of the next, `(rows, vocab)`."""
        model, rows = self._adapters.model, self.rows
        end = max(row.length for row in rows) + 1
        is_padded = any(row.length + 1 < end for row in rows)
        starts = torch.tensor([end - 1 - row.length for row in rows])
        mask = (torch.arange(end) >= starts[:, None]).long().to(model.device) if is_padded else None
        for row in rows:
            row.block += 1
        outputs: Any = model(
            input_ids=torch.tensor([[row.token] for row in rows], device=model.device),
            position_ids=torch.tensor([[[row.position], [row.block]] for row in rows], device=model.device),
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            **self._adapters.keywords([row.generation.request.adapter for row in rows]),
        )
        for row in rows:
            row.length += 1
        return outputs.logits[:, -1]


def _pad_left(prompts: Sequence[Sequence[int]], model: Any) -> tuple[Tensor, Tensor]:
    """Return prompts as input_ids and their mask, `(batch, seq)` each, long."""
    end = max(map(len, prompts))
    padded = [[*[model.config.pad_token_id] * (end - len(prompt)), *prompt] for prompt in prompts]
    mask = [[*[0] * (end - len(prompt)), *[1] * len(prompt)] for prompt in prompts]
    return torch.tensor(padded, device=model.device), torch.tensor(mask, device=model.device)


def _begin_cache(prefixes: Sequence[Tensor | None], device: torch.device) -> tuple[Cache, Tensor]:
    """Return a cache with the prefix of each row that has one, and its mask, `(batch, longest prefix)`, long.

    prefixes: `(layers * 2, 1, heads, prefix, head_dim)` each.
    """
    cache, end = make_cache(), max(0 if prefix is None else prefix.shape[-2] for prefix in prefixes)
    mask = torch.zeros(len(prefixes), end, dtype=torch.long, device=device)
    shared = next((prefix for prefix in prefixes if prefix is not None), None)
    if shared is None:
        return cache, mask
    layers, _, heads, _, head_dim = shared.shape
    joined = shared.new_zeros(layers, len(prefixes), heads, end, head_dim)
    for index, prefix in enumerate(prefixes):
        if prefix is not None:
            joined[:, index, :, end - prefix.shape[-2] :] = prefix[:, 0]
            mask[index, end - prefix.shape[-2] :] = 1
    for layer, (key, value) in enumerate(joined.unflatten(0, (-1, 2))):
        cache.update(key, value, layer)
    return cache, mask


def make_picker(settings: GenerationSettings, device: torch.device) -> Callable[[Tensor], int]:
    """Return what draws a token from logits `(vocab,)` as `generate` does, with random numbers of its own."""
    if not settings.do_sample:
        return lambda logits: int(logits.argmax())
    processors = LogitsProcessorList()
    if settings.temperature != 1:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    generator = torch.Generator(device)
    if settings.seed is None:
        generator.seed()
    else:
        generator.manual_seed(settings.seed)
    no_ids: Any = torch.empty(1, 0, dtype=torch.long)

    def pick(logits: Tensor) -> int:
        scores = processors(no_ids, logits.float()[None])
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=generator))

    return pick


def stream_from(
    engine: BatchEngine, request: Request, *, stop: Callable[[], bool] = never
) -> Generator[int, None, FinishReason]:
    """Yield the answer's token ids as they are drawn, without <eop>, and return why it ended.

    stop: asked often; once it is true no more tokens come. Closing the iterator does the same.
    Raises what `submit` raises, and the error that ended the answer.
    """
    events: queue.SimpleQueue[int | Finished] = queue.SimpleQueue()
    generation = engine.submit(request, events.put)
    try:
        while True:
            if stop():
                return "cancelled"
            try:
                event = events.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(event, int):
                yield event
            elif event.error is not None:
                raise event.error
            else:
                return event.reason
    finally:
        generation.cancel()


def _hand_out(generation: Generation, event: int | Finished) -> None:
    """Deliver an event; whoever takes it may be gone."""
    try:
        generation.deliver(event)
    except Exception:
        logger.exception("an answer could not be delivered and is cancelled")
        generation.cancel()


def _log_unless_told(error: Exception) -> None:
    if not isinstance(error, UserError):
        logger.error("an answer failed", exc_info=error)
