"""A pasted traceback, explained: what is known of errors that users of ChatGLM-6B meet."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from chatglm_tuning.config.doctor import Language
from chatglm_tuning.doctor.known import KnownError, known_errors
from chatglm_tuning.doctor.pages import codes, page
from chatglm_tuning.errors import UserError

_OURS = re.compile(r"error \[([A-Z]\d{3})\]")
_MOST_BYTES = 8 << 20
_MOST_SHOWN = 160
_LINES_OF_AN_ERROR = 12  # a message is folded by narrow terminals
# What terminals, torchrun and rich put around the words of a traceback.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
_PREFIXES = re.compile(r"^\s*(?:\[(?:rank|default)?\d+\]:?\[?|\d{1,3}:(?=\s))\s?", re.MULTILINE)
_BOXES = re.compile(r"[\u2500-\u257f\u2771❱]+")
_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "：": ":", "，": ",", "\u00a0": " "})
_ERROR_LINE = re.compile(r"^\W*((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Killed)\b.*)$", re.MULTILINE)

_TEXTS: dict[Language, dict[str, str]] = {
    "en": {
        "cause": "Cause",
        "fix": "Fix",
        "page": "More: chatglm-tuning doctor {code}",
        "also": "Also in it: {names}",
        "unknown": "This error is not known here.",
        "last": "Its last line: {line}",
        "report": "First run `chatglm-tuning doctor`: a problem that it finds may be the cause. If it finds none, "
        "report the error with: the whole traceback from its first line, the command, what `chatglm-tuning doctor` "
        "printed, and a few rows of data if it depends on them.",
    },
    "zh": {
        "cause": "原因",
        "fix": "解决办法",
        "page": "详情：chatglm-tuning doctor {code} --language zh",
        "also": "其中还有：{names}",
        "unknown": "不认识这个错误。",
        "last": "它的最后一行：{line}",
        "report": "请先运行 `chatglm-tuning doctor`，它发现的问题可能就是原因。如果没有发现问题，请报告该错误，"
        "并附上：从第一行开始的完整报错、所用命令、`chatglm-tuning doctor` 的输出；如果与数据有关，再附几行数据。",
    },
}


@dataclass(frozen=True)
class Explanation:
    """What is said of a traceback. is_known: whether its cause is."""

    lines: tuple[str, ...]
    is_known: bool


def read_pasted(path: str) -> str:
    """Return the text of a file, or of standard input for "-".

    Raises UserError where it cannot be read or holds nothing. Of a long log the end is taken.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(
            f"the traceback cannot be read ({error.strerror})",
            code="X108",
            where=path,
            remedy="Give a file of text, or - and paste it",
        ) from error
    text = _decode(data[-_MOST_BYTES:])
    if not text.strip():
        raise UserError(
            "the traceback is empty", code="X108", where=path, remedy="Give the error as it was printed, all its lines"
        )
    return text


def _decode(data: bytes) -> str:
    """Return text in whichever of the usual encodings it was saved."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("gb18030", errors="replace")


def explain(text: str, language: Language) -> Explanation:
    """Return cause and fix of the error in `text`, which may have anything else around it."""
    plain = as_plain_text(text)
    words, one_line = _TEXTS[language], " ".join(plain.split())
    ours = [code for code in _OURS.findall(one_line) if code in codes()]
    if ours:
        return Explanation((page(ours[-1], language),), is_known=True)
    found = _found_in(plain, one_line)
    if not found:
        last = _ERROR_LINE.findall(plain)
        told = [words["last"].format(line=last[-1].strip()[:_MOST_SHOWN])] if last else []
        return Explanation((words["unknown"], *told, words["report"]), is_known=False)
    first, others = found[0], found[1:]
    lines = [
        first.name[language],
        f"{words['cause']}: {first.cause[language]}",
        f"{words['fix']}: {first.fix[language]}",
    ]
    if first.code is not None:
        lines.append(words["page"].format(code=first.code))
    if others:
        lines.append(words["also"].format(names="; ".join(known.name[language] for known in others)))
    return Explanation(tuple(lines), is_known=True)


def _found_in(plain: str, one_line: str) -> list[KnownError]:
    """Return what is known of the text: causes before what follows from them, errors before warnings beside them."""
    lines = plain.splitlines()
    starts = [number for number, line in enumerate(lines) if _ERROR_LINE.match(line)]
    errors = " ".join(" ".join(lines[start : start + _LINES_OF_AN_ERROR]) for start in starts)
    errors = " ".join(errors.split())
    found = [known for known in known_errors() if known.pattern.search(one_line)]
    return sorted(found, key=lambda known: (known.follows, not known.pattern.search(errors)))


def as_plain_text(text: str) -> str:
    """Return pasted text without colours, frames, the ranks in front of lines, and typographic quotes."""
    text = _BOXES.sub(" ", _ESCAPES.sub("", text)).translate(_QUOTES)
    return _PREFIXES.sub("", text)
