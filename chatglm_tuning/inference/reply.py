"""The clean-up of a reply while it is still being written, so that nothing shown has to be repainted."""

import re

from chatglm_tuning.prompt import process_response

# What `process_response` may still change at the end of a text once more of it is known: whitespace is stripped,
# punctuation becomes full-width, and [[训练时间]] becomes a date.
_UNSETTLED_END = re.compile(r"(?:[\s,!:;?]|\[[训练时间]*\]?)+\Z")


class ReplyCleaner:
    """Cleans a reply piece by piece: all that `push` and `flush` return, joined, is `process_response` of the whole."""

    def __init__(self) -> None:
        self._last_shown = ""
        self._unsettled = ""

    def push(self, text: str) -> str:
        """Return what became final with `text`; what later text may change is held back."""
        text = self._unsettled + text
        end = _UNSETTLED_END.search(text)
        settled = text[: end.start()] if end else text
        self._unsettled = text[len(settled) :]
        return self._clean(settled)

    def flush(self) -> str:
        """Return the cleaned rest, and start anew."""
        text = self._clean(self._unsettled)
        self._last_shown = self._unsettled = ""
        return text

    def _clean(self, text: str) -> str:
        # The last character shown is context: it decides the width of a punctuation mark, and keeps a space behind it.
        text = process_response(self._last_shown + text)[len(self._last_shown) :]
        self._last_shown = text[-1:] or self._last_shown
        return text
