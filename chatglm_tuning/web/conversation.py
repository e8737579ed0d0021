"""What a visitor of the page has: one or two windows of rounds, and the answers that are being written in them."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace

from chatglm_tuning.config.web import Language
from chatglm_tuning.inference.engine import BatchEngine, Finished, FinishReason, Generation, Request
from chatglm_tuning.inference.reply import ReplyCleaner
from chatglm_tuning.inference.session import ChatSession, QuestionTooLongError
from chatglm_tuning.inference.stream import GenerationSettings
from chatglm_tuning.model.tokenization import ChatGLMTokenizer, IncrementalDecoder
from chatglm_tuning.prompt import Round
from chatglm_tuning.web.shelf import AdapterShelf

_SEEDS = 2**32
_SPECIAL_TOKENS = 2  # [gMASK] <sop>
# How often a page looks for new text: often enough to look fluent, and seldom enough for many pages on a slow machine.
_LOOK_SECONDS = 0.05


class Answer:
    """An answer: the engine's thread writes it, the page reads it.

    adapter: the name of who writes it. text: what came so far, cleaned. tokens: how many came, without <eop>.
    dropped_rounds: rounds of the history that did not fit into the prompt. reason: why it ended, None before.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, adapter: str, dropped_rounds: int) -> None:
        self.adapter = adapter
        self.dropped_rounds = dropped_rounds
        self.text = ""
        self.tokens = 0
        self.reason: FinishReason | None = None
        self.error: Exception | None = None
        self._first_seconds = self._last_seconds = 0.0
        self._decoder, self._cleaner = IncrementalDecoder(tokenizer), ReplyCleaner()
        self._generation: Generation | None = None
        self._lock = threading.Lock()

    @property
    def tokens_per_second(self) -> float | None:
        """The rate from the first token to the last, None where there are not two."""
        seconds = self._last_seconds - self._first_seconds
        return (self.tokens - 1) / seconds if self.tokens > 1 and seconds > 0 else None

    def start(self, engine: BatchEngine, request: Request) -> None:
        """Ask the engine for it; raises QueueFullError and EngineClosedError."""
        self._generation = engine.submit(request, self._take)

    def stop(self) -> None:
        """End it at once, with what came so far."""
        with self._lock:
            self._end("cancelled")
        if self._generation is not None:
            self._generation.cancel()

    def _take(self, event: int | Finished) -> None:
        with self._lock:
            if self.reason is not None:
                return
            if isinstance(event, Finished):
                self._end(event.reason, event.error)
                return
            self._last_seconds = time.perf_counter()
            self._first_seconds = self._first_seconds or self._last_seconds
            self.tokens += 1
            self.text += self._cleaner.push(self._decoder.push(event))

    def _end(self, reason: FinishReason, error: Exception | None = None) -> None:
        if self.reason is None:
            rest = self._decoder.flush().rstrip("\ufffd")
            self.text += self._cleaner.push(rest) + self._cleaner.flush()
            self.reason, self.error = reason, error


@dataclass(frozen=True)
class Exchange:
    """A question and its answer. attempt: how often the question was answered anew."""

    question: str
    answer: Answer
    attempt: int = 0


@dataclass
class Visit:
    """One visitor.

    language: what it is shown in. is_told_to_wait: whether the page says that an answer is still being written.
    windows: the rounds of the first and the second, oldest first.
    """

    language: Language = "zh"
    is_told_to_wait: bool = False
    windows: tuple[list[Exchange], list[Exchange]] = field(default_factory=lambda: ([], []))

    @property
    def last_answers(self) -> list[Answer]:
        """The newest answer of every window that has one."""
        return [exchange.answer for window in self.windows for exchange in window[-1:]]

    @property
    def is_writing(self) -> bool:
        """Whether an answer has not ended yet."""
        return any(answer.reason is None for answer in self.last_answers)

    def stop(self) -> None:
        """End the answers that are being written; what came stays."""
        for answer in self.last_answers:
            answer.stop()

    def clear(self) -> None:
        """Forget everything."""
        self.stop()
        for window in self.windows:
            window.clear()

    def show_right(self, is_shown: bool) -> None:
        """Give the second window the rounds of the first one, so that both go on from the same, or forget it."""
        left, right = self.windows
        for exchange in right[-1:]:
            if exchange not in left:
                exchange.answer.stop()
        right[:] = left if is_shown else []


class QuestionLengthError(ValueError):
    """No answer fits behind the question. tokens: the question's. limit: of question and answer together."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"{tokens} tokens of at most {limit}")
        self.tokens, self.limit = tokens, limit


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What was chosen for an answer. adapters: one name for every window that answers."""

    adapters: Sequence[str]
    keeps_history: bool
    settings: GenerationSettings


class Chat:
    """Asks the engine for what visitors want."""

    def __init__(self, engine: BatchEngine, tokenizer: ChatGLMTokenizer, shelf: AdapterShelf) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self.shelf = shelf

    def ask(self, visit: Visit, question: str, choices: Choices) -> None:
        """Start an answer to `question` in every window that answers.

        Raises QuestionLengthError, QueueFullError and EngineClosedError; then nothing has changed.
        """
        self._answer(visit, [(question, 0, window) for window in visit.windows], choices)

    def answer_again(self, visit: Visit, choices: Choices) -> None:
        """Answer the last question anew; the visit must have one. Raises as `ask` does."""
        latest = visit.windows[0][-1]
        asked = [(latest.question, latest.attempt + 1, window[:-1]) for window in visit.windows]
        self._answer(visit, asked, choices)

    def _answer(self, visit: Visit, asked: Sequence[tuple[str, int, list[Exchange]]], choices: Choices) -> None:
        """asked: question, attempt and the exchanges before it, for every window."""
        new: list[list[Exchange]] = []
        try:
            for (question, attempt, before), adapter in zip(asked, choices.adapters, strict=False):
                answer = self._start(question, attempt, before, choices, adapter)
                new.append([*before, Exchange(question, answer, attempt)])
        except Exception:
            for exchanges in new:
                exchanges[-1].answer.stop()
            raise
        for window, exchanges in zip(visit.windows, new, strict=False):
            window[:] = exchanges

    def _start(self, question: str, attempt: int, before: Sequence[Exchange], choices: Choices, adapter: str) -> Answer:
        settings = choices.settings
        if settings.seed is not None:
            settings = replace(settings, seed=(settings.seed + attempt) % _SEEDS)
        session = ChatSession(None, self._tokenizer, settings)
        session.history = _history(before) if choices.keeps_history else []
        try:
            prompt_ids = session.encode_prompt(question)
        except QuestionTooLongError as error:
            tokens = len(self._tokenizer.encode_text(question)) + _SPECIAL_TOKENS
            raise QuestionLengthError(tokens, settings.max_length) from error
        answer = Answer(self._tokenizer, adapter, session.dropped_rounds)
        answer.start(self._engine, Request(prompt_ids=prompt_ids, settings=settings, adapter=self.shelf[adapter]))
        return answer


async def watch(visit: Visit) -> AsyncGenerator[None]:
    """Yield whenever a page may have something new to show, until nothing is being written any more.

    Where it is closed before, the page is gone, and the answers end.
    """
    try:
        while visit.is_writing:
            yield
            await asyncio.sleep(_LOOK_SECONDS)
    finally:
        visit.stop()


def _history(exchanges: Sequence[Exchange]) -> list[Round]:
    return [(exchange.question, exchange.answer.text) for exchange in exchanges if exchange.answer.text]
