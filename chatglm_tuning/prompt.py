"""Chat rounds as pure strings: the prompt that ChatGLM-6B was trained on, and the clean-up of its replies.

Source: THUDM/chatglm-6b, modeling_chatglm.py, `chat` and `process_response` (revision 8b7d335).
"""

import re
from collections.abc import Sequence

Round = tuple[str, str]

_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_CHINESE = r"[\u4e00-\u9fff]"


def build_prompt(query: str, history: Sequence[Round] = ()) -> str:
    """Return the text that the model reads for `query` after the (question, answer) rounds of `history`.

    Without history the prompt is the query itself; the rounds are numbered from 0.
    """
    if not history:
        return query
    rounds = [f"[Round {i}]\n问：{question}\n答：{answer}\n" for i, (question, answer) in enumerate(history)]
    return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："


def process_response(text: str) -> str:
    """Return the reply as chat shows it: stripped, dated, and with full-width punctuation beside Chinese characters."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    for half, full in _FULL_WIDTH.items():
        text = re.sub(rf"({_CHINESE}){re.escape(half)}", rf"\g<1>{full}", text)
        text = re.sub(rf"{re.escape(half)}({_CHINESE})", rf"{full}\g<1>", text)
    return text
