"""A conversation without input or output: history in, pieces of text out."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from chatglm_tuning.data.encode import fit_history
from chatglm_tuning.errors import UserError
from chatglm_tuning.inference.reply import ReplyCleaner
from chatglm_tuning.inference.stream import GenerationSettings, never, stream_tokens
from chatglm_tuning.model.tokenization import ChatGLMTokenizer, IncrementalDecoder
from chatglm_tuning.prompt import Round, build_prompt, process_response

# History fills at most three quarters of max_length: with less left, answers would be cut off after a few words.
_ANSWER_SHARE = 4


class QuestionTooLongError(UserError):
    """The question alone leaves no room for an answer; the session can go on with another one."""


class ChatSession:
    """One conversation with a model.

    keep_history: False lets every question stand alone.
    The n-th answer is drawn with the seed `settings.seed + n` (from 0), so that a conversation can be repeated even
    where an answer was stopped, and a question asked again is answered anew.

    history: the (question, answer) rounds so far, oldest first.
    dropped_rounds: the oldest rounds that did not fit into the last prompt.
    """

    def __init__(
        self, model: Any, tokenizer: ChatGLMTokenizer, settings: GenerationSettings, keep_history: bool = True
    ) -> None:
        self.history: list[Round] = []
        self.dropped_rounds = 0
        self._model = model
        self._tokenizer = tokenizer
        self._settings = settings
        self._keep_history = keep_history
        self._answers = 0

    def clear(self) -> None:
        """Forget all rounds."""
        self.history.clear()
        self.dropped_rounds = 0

    def reply(self, query: str, *, stop: Callable[[], bool] = never) -> Generator[str, None, None]:
        """Yield the answer to `query` in pieces of whole characters, and remember the round.

        The pieces joined are the cleaned answer. An answer that is stopped, by `stop` or by closing the iterator, is
        remembered as far as it came, without a character that is not whole; one that has no text, or that an error
        ended, is not.
        Raises QuestionTooLongError where no answer fits behind the question, and what `stream_tokens` raises.
        """
        prompt_ids = torch.tensor([self.encode_prompt(query)], device=self._model.device)
        seed = self._settings.seed
        settings = replace(self._settings, seed=None if seed is None else seed + self._answers)
        self._answers += 1
        decoder, cleaner = IncrementalDecoder(self._tokenizer), ReplyCleaner()
        text = ""
        try:
            with closing(stream_tokens(self._model, prompt_ids, settings=settings, stop=stop)) as tokens:
                for token in tokens:
                    piece = decoder.push(token)
                    text += piece
                    if shown := cleaner.push(piece):
                        yield shown
        except GeneratorExit:
            self._remember(query, text + _flush(decoder))
            raise
        rest = _flush(decoder)
        self._remember(query, text + rest)
        if shown := cleaner.push(rest) + cleaner.flush():
            yield shown

    def encode_prompt(self, query: str) -> list[int]:
        """Return the ids of `query` behind as much history as fits, with [gMASK] <sop>, and set `dropped_rounds`."""
        max_length = self._settings.max_length
        special = [self._tokenizer.gmask_token_id, self._tokenizer.bos_token_id]
        room = max_length - max_length // _ANSWER_SHARE - len(special)
        history = fit_history(query, self.history, room, lambda text: len(self._tokenizer.encode_text(text)))
        prompt_ids = [*self._tokenizer.encode_text(build_prompt(query, history)), *special]
        if len(prompt_ids) >= max_length:
            raise QuestionTooLongError(
                f"the question has {len(prompt_ids)} tokens, and question and answer together may have {max_length}",
                code="S104",
                remedy="Ask in fewer words, or give a larger --max_length",
            )
        self.dropped_rounds = len(self.history) - len(history)
        return prompt_ids

    def _remember(self, query: str, text: str) -> None:
        if self._keep_history and (answer := process_response(text)):
            self.history.append((query, answer))


def _flush(decoder: IncrementalDecoder) -> str:
    return decoder.flush().rstrip("\ufffd")
