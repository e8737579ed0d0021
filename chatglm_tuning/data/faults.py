"""What single texts hold that training would learn wrongly: control tokens, damaged characters, cut sentences."""

import re
import unicodedata
from collections.abc import Iterator

import ftfy.badness

# The names of every token of the released vocabulary that is no text, and the template of a dialogue.
_CONTROL = re.compile(
    r"\[(?:MASK|gMASK|sMASK|CLS|SEP)\]|</?s>|<(?:sop|eop|eos|pad|unk|unused_\d+|image_\d+|ENC|dBLOCK)>"
    r"|<\|(?:startofpiece|endofpiece|endoftext|im_start|im_end)\|>"
)
_WHITESPACE_STAND_IN = re.compile(r"<(?:n|\|tab\||\|blank_\d+\|)>")
_TEMPLATE = re.compile(r"\[Round \d+\]\s*\n?问[:：]")
_MARKUP = re.compile(r"&(?:nbsp|lt|gt|amp|quot|#\d{2,5});|</?(?:p|br|div|span|img|table|tr|td)\b[^<>]{0,200}>", re.I)

# What undecodable bytes became, bytes of the wrong codec, and characters that no writer types.
_REPLACED = re.compile("\ufffd|锟斤拷|锘|烫烫烫|屯屯屯")
_UNPRINTABLE = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\ue000-\uf8ff]")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_KANA = re.compile("[\u3040-\u30ff]")
_HANGUL = re.compile("[\uac00-\ud7af]")
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
# UTF-8 of Chinese begins with bytes E3 to E9 and one of 80 to BF, which GBK reads as one of these rare characters.
_MISREAD_STARTS = "".join(
    bytes([first, second]).decode("gb18030") for first in range(0xE3, 0xEA) for second in range(0x80, 0xC0)
)
# Of shorter runs, ordinary words are valid by chance: one in some ten thousand of three characters.
_MISREAD_RUN = re.compile(f"[{_MISREAD_STARTS}][^\x00-\x7f]{{5}}")
_LATIN_MISREAD_RUN = re.compile(
    "[\x80-\xff\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122]{2,}"
)

_PAUSES = frozenset("，,、：:；;（(【[《<“‘「『—-+=*/&")
_ENDS = frozenset({"Po", "Pe", "Pf", "So", "Sk", "Sm"})

# A letter of these carries about as much as that many letters of Latin script.
_LATIN_LETTERS_PER_HAN = 3
_SHARE_OF_ONE_LANGUAGE = 0.7


def damage_of(text: str) -> str | None:
    """Name what shows that `text` was decoded wrongly somewhere, or None.

    Characters that stand for undecodable bytes; invisible ones; UTF-8 that was read as GBK (`浣犲ソ` for `你好`) or, by
    ftfy's measure of badness, as Latin-1 or Windows-1252 (`ä½\xa0å¥½`).
    """
    if text.isascii():
        return "unprintable characters" if _UNPRINTABLE.search(text) else None
    if _REPLACED.search(text):
        return "characters that replace undecodable bytes"
    if _is_utf8_read_as_gbk(text):
        return "UTF-8 that was read as GBK"
    if ftfy.badness.is_bad(text) and _is_utf8_read_as_latin(text):
        return "UTF-8 that was read as Latin-1"
    if _UNPRINTABLE.search(text):
        return "unprintable characters"
    return None


def _is_utf8_read_as_gbk(text: str) -> bool:
    """Whether six characters in a row are, in GBK, valid UTF-8 of four others."""
    for run in _MISREAD_RUN.findall(text):
        try:
            original = run.encode("gb18030").decode("utf-8")
        except UnicodeError:
            continue
        if len(_HAN.findall(original)) >= len(original) // 2:
            return True
    return False


def _is_utf8_read_as_latin(text: str) -> bool:
    """Whether some run of accented letters and signs is valid UTF-8 once it is bytes again."""
    for run in _LATIN_MISREAD_RUN.findall(text):
        for codec in ("latin-1", "cp1252"):
            try:
                run.encode(codec).decode("utf-8")
            except UnicodeError:
                continue
            return True
    return False


def oddities_of(text: str) -> Iterator[str]:
    """Yield the names of what a text holds that does not belong into the words of a dialogue."""
    if "[" in text or "<" in text:
        if _CONTROL.search(text):
            yield "control tokens written out"
        if _WHITESPACE_STAND_IN.search(text):
            yield "stand-ins for whitespace, which are read as whitespace"
        if _TEMPLATE.search(text):
            yield "the template of a dialogue, which is added anyway"
    if ("&" in text or "<" in text) and _MARKUP.search(text):
        yield "HTML"


def ends_like_a_sentence(text: str) -> bool:
    """Whether the last character is one that ends a sentence, a list or a block: no letter, and no comma."""
    last = text.rstrip()[-1:]
    return last not in _PAUSES and unicodedata.category(last or ".") in _ENDS


def language_of(text: str) -> str:
    """Guess the language of `text` by its scripts: Chinese, English, Japanese, Korean, mixed or other.

    English stands for every language in Latin script.
    """
    kana, hangul = len(_KANA.findall(text)), len(_HANGUL.findall(text))
    han = len(_HAN.findall(text))
    latin = len(_LATIN.findall(text)) / _LATIN_LETTERS_PER_HAN
    if kana > 0.2 * (han + kana):
        weights = {"Japanese": kana + han, "Korean": hangul, "English": latin}
    else:
        weights = {"Chinese": han + kana, "Korean": hangul, "English": latin}
    total = sum(weights.values())
    if not total:
        return "other"
    name = max(weights, key=weights.__getitem__)
    return name if weights[name] >= _SHARE_OF_ONE_LANGUAGE * total else "mixed"
