"""What is seen in single texts, and what is not."""

import json
import time

import pytest

from chatglm_tuning.data.faults import damage_of, ends_like_a_sentence, language_of, oddities_of
from tests.model_folder import REPOSITORY

CLEAN = [
    "你好，世界。很高兴见到你！",
    "naïve café “quoted” — fine, señor Müller",
    "用 Python 写的 for 循环：a[0] < b && c > d",
    "日本語の文章です。",
    "한국어 문장입니다.",
    "😀👍 表情 🎉",
    "鐨、勪、浣、犲、ソ",
    "数学家庭作业完成了吗？",
    "a\tb\nc",
]
DAMAGED = {
    "你好�世界": "characters that replace undecodable bytes",
    "锟斤拷锟斤拷": "characters that replace undecodable bytes",
    "大家好，今天天气不错".encode().decode("gbk", errors="ignore"): "UTF-8 that was read as GBK",
    "前面正常，" + "你好世界很高兴见到".encode().decode("gbk", errors="ignore"): "UTF-8 that was read as GBK",
    "你好世界".encode().decode("latin-1"): "UTF-8 that was read as Latin-1",
    "It’s".encode().decode("cp1252"): "UTF-8 that was read as Latin-1",
    "零宽\ufeff字符": "unprintable characters",
    "bell\x07": "unprintable characters",
}
ODD = {
    "答案<eop>": ["control tokens written out"],
    "[gMASK]<sop>你好": ["control tokens written out"],
    "<s>[INST]</s>": ["control tokens written out"],
    "<|im_start|>user": ["control tokens written out"],
    "第一行<n>第二行": ["stand-ins for whitespace, which are read as whitespace"],
    "a<|blank_4|>b": ["stand-ins for whitespace, which are read as whitespace"],
    "[Round 0]\n问：你好\n答：": ["the template of a dialogue, which is added anyway"],
    "买一送一&nbsp;<br/>": ["HTML"],
}


@pytest.mark.parametrize("text", CLEAN)
def test_a_clean_text_has_nothing(text):
    assert damage_of(text) is None
    assert list(oddities_of(text)) == []


@pytest.mark.parametrize(("text", "expected"), DAMAGED.items())
def test_damage_is_named(text, expected):
    assert damage_of(text) == expected


@pytest.mark.parametrize(("text", "expected"), ODD.items())
def test_what_is_no_word_of_a_dialogue_is_named(text, expected):
    assert list(oddities_of(text)) == expected


def test_no_sample_row_is_called_damaged():
    for name in ("sample_train.json", "sample_dev.json"):
        for line in (REPOSITORY / "data" / "AdvertiseGen" / name).read_text(encoding="utf-8").splitlines():
            for text in json.loads(line).values():
                assert damage_of(text) is None, text
                assert not list(oddities_of(text)), text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("很好。", True),
        ("“很好！”", True),
        ("真的吗?", True),
        ("好看😀", True),
        ("def f():\n    return [1]", True),
        ("很好，", False),
        ("很", False),
        ("如下：", False),
        ("and then", False),
    ],
)
def test_an_end_is_told_from_a_cut(text, expected):
    assert ends_like_a_sentence(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("你好，世界", "Chinese"),
        ("Write a poem about the sea", "English"),
        ("用 Python 写代码", "mixed"),
        ("東京はとても大きい", "Japanese"),
        ("서울은 큰 도시", "Korean"),
        ("12345 + 67", "other"),
    ],
)
def test_the_language_follows_the_script(text, expected):
    assert language_of(text) == expected


@pytest.mark.parametrize("text", ["<" * 100_000, "&" * 100_000, "[Round " * 20_000, "浣" * 100_000, "Ã" * 100_000])
def test_no_text_takes_long(text):
    start = time.process_time()
    damage_of(text)
    list(oddities_of(text))
    assert time.process_time() - start < 2
