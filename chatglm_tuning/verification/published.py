"""What is published of ChatGLM-6B: digests of its files, and answers that its weights give.

Source: THUDM/chatglm-6b on the Hugging Face hub, revision 8b7d335; the answers are those of its authors' README and of
chatglm.cpp's tests, drawn greedily.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

FILE_DIGESTS: Mapping[str, str] = {
    "ice_text.model": "5e974d9a69c242ce014c88c2b26089270f6198f3c0b700a887666cd3e816f17e",
}
"""SHA-256 by name; the weights' own are not among them."""

LAYERS, HIDDEN_SIZE, VOCAB_SIZE = 28, 4096, 130528


@dataclass(frozen=True)
class PublishedAnswer:
    """What the released weights answer greedily. length: tokens that an answer takes, at most."""

    query: str
    answer: str
    length: int = 64

    def is_given(self, answer: str) -> bool:
        """Whether `answer` is the published one; full-width and half-width punctuation are the same."""
        return unicodedata.normalize("NFKC", answer) == unicodedata.normalize("NFKC", self.answer)


ANSWERS = (PublishedAnswer("你好", "你好👋!我是人工智能助手 ChatGLM-6B,很高兴见到你,欢迎问我任何问题。"),)
