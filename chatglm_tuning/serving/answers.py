"""From a request that was read to pieces of its answers, drawn by the engine."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from chatglm_tuning.config.arguments import ChatArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.inference.engine import (
    EngineClosedError,
    Finished,
    Generation,
    QueueFullError,
    Request,
)
from chatglm_tuning.inference.stream import GenerationSettings
from chatglm_tuning.serving.prompts import chat_prompt, encode_prompt, too_long
from chatglm_tuning.serving.protocol import (
    ChatBody,
    CompletionBody,
    Envelope,
    GenerationBody,
    ProtocolError,
    overloaded,
    shutting_down,
    usage_of,
)
from chatglm_tuning.serving.reading import AnswerReader
from chatglm_tuning.serving.service import Service

# Below it the scaled logits leave the range of fp32, and all but the likeliest token have long lost any chance.
_LEAST_TEMPERATURE = 1e-4
# What the protocol says where /v1/completions is given no max_tokens.
_COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class Piece:
    """A piece of the choice `index`; finish_reason: only with its last one."""

    index: int
    text: str
    finish_reason: str | None = None


class Answers:
    """The choices that a request asked for, on their way. Must be made in the event loop; ends with `close`."""

    def __init__(self, service: Service, body: GenerationBody, prompts: Sequence[list[int]], started: float) -> None:
        """Ask the engine for them; raises ProtocolError where it takes no more.

        prompts: each whole, with [gMASK] <sop>. started: when the request came, by `time.perf_counter`.
        """
        is_chat = isinstance(body, ChatBody)
        self.envelope = Envelope(
            id=f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            kind="chat.completion" if is_chat else "text_completion",
            created=int(time.time()),
            model=body.model,
            fingerprint=service.fingerprint,
        )
        self._service = service
        self._started = started
        self._prompt_tokens = sum(map(len, prompts))
        self._events: asyncio.Queue[tuple[int, int | Finished]] = asyncio.Queue()
        self._has_begun = self._is_closed = False
        requests = _requests(service, body, prompts)
        self._readers = [AnswerReader(service.tokenizer, body.stop or (), is_cleaned=is_chat) for _request in requests]
        self._generations = self._submit(requests)

    @property
    def usage(self) -> dict[str, int]:
        """The tokens so far; each prompt is read once, whatever the number of its answers."""
        return usage_of(self._prompt_tokens, sum(reader.tokens for reader in self._readers))

    @property
    def indices(self) -> range:
        """The numbers of the choices."""
        return range(len(self._readers))

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yield what there is to be shown, until every choice has had its finish_reason.

        Raises ProtocolError where an answer fails or the server ends before it.
        """
        unfinished = set(self.indices)
        while unfinished:
            index, event = await self._events.get()
            if not self._has_begun:
                self._has_begun = True
                seconds = time.perf_counter() - self._started
                self._service.metrics.observe_first_token(self.envelope.model, seconds)
            if index not in unfinished:
                continue
            piece = self._read(index, event)
            if piece.finish_reason is not None:
                unfinished.remove(index)
            if piece.text or piece.finish_reason:
                yield piece

    def close(self) -> None:
        """Let go of what is still being drawn, and count the tokens."""
        if self._is_closed:
            return
        self._is_closed = True
        for generation in self._generations:
            generation.cancel()
        usage = self.usage
        self._service.metrics.count_tokens(self.envelope.model, usage["prompt_tokens"], usage["completion_tokens"])

    def _submit(self, requests: Sequence[Request]) -> list[Generation]:
        loop = asyncio.get_running_loop()

        def deliver_to(index: int, event: int | Finished) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        wanted = [(request, partial(deliver_to, index)) for index, request in enumerate(requests)]
        try:
            return self._service.engine.submit_all(wanted)
        except QueueFullError:
            raise overloaded("The server has as many requests as it can take", "queue_full") from None
        except EngineClosedError:
            raise shutting_down() from None

    def _read(self, index: int, event: int | Finished) -> Piece:
        reader = self._readers[index]
        if isinstance(event, int):
            text = reader.push(event)
            if reader.is_stopped:
                self._generations[index].cancel()
            return Piece(index, text, "stop" if reader.is_stopped else None)
        if event.error is not None:
            said = event.error.what if isinstance(event.error, UserError) else "The server failed to write this answer"
            raise ProtocolError(500, said, code="generation_failed", kind="server_error")
        if event.reason == "cancelled":
            raise shutting_down()
        text = reader.finish()
        return Piece(index, text, "stop" if reader.is_stopped else event.reason)


async def begin_answers(service: Service, body: ChatBody | CompletionBody, started: float) -> Answers:
    """Encode the prompts of a request and ask for its answers; raises ProtocolError for whatever does not fit."""
    service.adapter(body.model)
    count = 1 if isinstance(body, ChatBody) else len(body.prompt)
    choices = count * body.choices_for_each
    if choices > service.engine.capacity:
        raise ProtocolError(
            400,
            f"This server takes at most {service.engine.capacity} answers in one request, not {choices}",
            code="invalid_value",
            param="n" if count == 1 else "prompt",
        )
    # Not in the event loop: a long text takes a while.
    prompts = await asyncio.to_thread(_encode_prompts, service, body)
    return Answers(service, body, prompts, started)


def _encode_prompts(service: Service, body: ChatBody | CompletionBody) -> list[list[int]]:
    tokenizer = service.tokenizer
    if isinstance(body, ChatBody):
        return [encode_prompt(tokenizer, chat_prompt(tokenizer, body.messages, service.max_length))]
    return [encode_prompt(tokenizer, text) for text in body.prompt]


def _requests(service: Service, body: GenerationBody, prompts: Sequence[list[int]]) -> list[Request]:
    """Return what the engine is asked for: every prompt's answers, one prompt after the other."""
    adapter = service.adapter(body.model)
    requests = []
    for prompt_ids in prompts:
        room = service.max_length - len(prompt_ids)
        limit = _output_limit(service, body, room, len(prompt_ids))
        requests += [
            Request(
                prompt_ids=prompt_ids,
                settings=_settings(body, len(prompt_ids) + limit, len(requests) + number),
                adapter=adapter,
            )
            for number in range(body.choices_for_each)
        ]
    return requests


def _output_limit(service: Service, body: GenerationBody, room: int, prompt_tokens: int) -> int:
    """Return how many tokens an answer may have, and refuse what was asked for and cannot be kept."""
    if room < 1:
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        raise too_long(f"{prompt_tokens} in its prompt", service.max_length, param=param)
    asked, most = body.output_limit, service.arguments.max_output_tokens
    if asked is None:
        default = room if isinstance(body, ChatBody) else _COMPLETION_TOKENS
        return min(default, room, most or room)
    if most is not None and asked > most:
        raise ProtocolError(
            400,
            f"An answer may have at most {most} tokens here, not {asked}",
            code="invalid_value",
            param=body.limit_name,
        )
    if asked > room:
        raise too_long(
            f"{prompt_tokens} in its prompt and asks for {asked} more", service.max_length, param=body.limit_name
        )
    return asked


def _settings(body: GenerationBody, max_length: int, number: int) -> GenerationSettings:
    """Return how the answer with this number is drawn: as chat does, but for what the request says."""
    temperature = ChatArguments.temperature if body.temperature is None else body.temperature
    is_greedy = temperature < _LEAST_TEMPERATURE
    return GenerationSettings(
        max_length=max_length,
        do_sample=not is_greedy,
        temperature=1.0 if is_greedy else temperature,
        top_p=ChatArguments.top_p if body.top_p is None else body.top_p,
        top_k=GenerationSettings.top_k if body.top_k is None else body.top_k,
        seed=None if body.seed is None else body.seed + number,
    )
