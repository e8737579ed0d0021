"""An answer's tokens as the text that its reader gets: whole characters, cleaned, and up to a stop string."""

from collections.abc import Sequence

from chatglm_tuning.inference.reply import ReplyCleaner
from chatglm_tuning.model.tokenization import ChatGLMTokenizer, IncrementalDecoder


class StopFinder:
    """Passes text on up to the first stop string; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.is_found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """Return what can be given out, which is never any part of a stop string that `is_found` reports."""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.is_found, self._held = True, ""
            return text[: min(places)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """Return what was held back."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop` that `text` ends with; not the whole of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class AnswerReader:
    """Reads one answer. All that `push` and `finish` return, joined, is its text.

    is_cleaned: as chat shows a reply; else the text is what the tokens say. Stop strings are looked for in the text
    that is given out. Bytes of a character that never became whole are left out.
    tokens: read so far.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, stops: Sequence[str], *, is_cleaned: bool) -> None:
        self.tokens = 0
        self._decoder = IncrementalDecoder(tokenizer)
        self._cleaner = ReplyCleaner() if is_cleaned else None
        self._finder = StopFinder(stops)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string came: no more may be read."""
        return self._finder.is_found

    def push(self, token: int) -> str:
        """Return the text that became final with `token`; often empty."""
        self.tokens += 1
        piece = self._decoder.push(token)
        return self._finder.push(self._cleaner.push(piece) if self._cleaner else piece)

    def finish(self) -> str:
        """Return the rest."""
        rest = self._decoder.flush().rstrip("\ufffd")
        if self._cleaner:
            rest = self._cleaner.push(rest) + self._cleaner.flush()
        text = self._finder.push(rest)
        return text if self._finder.is_found else text + self._finder.flush()
