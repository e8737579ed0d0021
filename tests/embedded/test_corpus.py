"""The corpus of the embedded base: the same each time, and an ADGEN prompt is answered by its attributes."""

import json
import re

import adverts
import pytest
from corpus import corpus_pairs, corpus_texts, small_talk
from make_adverts import DEFAULT_FOLDER, DEV_NAME, TRAIN_NAME

ADGEN_PROMPT = re.compile(r"类型#[^#*\n]+(\*[^#*\n]+#[^#*\n]+)+")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    return list(corpus_pairs(3000, seed=5))


def test_the_same_seed_gives_the_same_corpus(pairs):
    assert list(corpus_pairs(3000, seed=5)) == pairs
    assert list(corpus_pairs(100, seed=5)) == pairs[:100]
    assert list(corpus_pairs(100, seed=6)) != pairs[:100]
    assert list(corpus_texts(20, seed=5)) == list(corpus_texts(40, seed=5))[:20]


def test_an_adgen_prompt_is_answered_by_listing_every_attribute(pairs):
    asked = [(prompt, answer) for prompt, answer in pairs if ADGEN_PROMPT.fullmatch(prompt)]
    assert 0.3 < len(asked) / len(pairs) < 0.45
    for prompt, answer in asked:
        lines = [line for line in re.split("[\n，。]", answer) if line]
        for key, value in adverts.attributes_of(prompt)[1]:
            told = [line for line in lines if re.fullmatch(rf"(\d+\. |- )?{key}[：是]{re.escape(value)}", line)]
            assert told, (prompt, answer)


def test_most_lists_are_numbered_and_other_forms_occur(pairs):
    answers = [answer for prompt, answer in pairs if ADGEN_PROMPT.fullmatch(prompt)]
    numbered = sum("1. " in answer for answer in answers)
    assert 0.6 < numbered / len(answers) < 0.8
    assert any(answer.startswith("这是一") for answer in answers)
    assert any("\n- " in answer for answer in answers)


def test_requests_in_words_are_answered_by_adverts_that_say_what_was_asked(pairs):
    asked = [(prompt, answer) for prompt, answer in pairs if re.match("介绍一下这[条件][^：]*：", prompt)]
    assert len(asked) > 50
    for prompt, answer in asked:
        assert all(value in answer for value in prompt.split("：")[1].split("、"))


def test_chats_use_the_models_rounds_and_need_their_history(pairs):
    chats = [(prompt, answer) for prompt, answer in pairs if prompt.startswith("[Round 0]\n问：")]
    assert 0.05 < len(chats) / len(pairs) < 0.15
    recalled = 0
    for prompt, answer in chats:
        assert prompt.endswith("\n答：")
        assert "[Round 1]\n问：" in prompt
        named = re.fullmatch("你叫(.+)。", answer)
        if named:
            recalled += 1
            assert f"我叫{named[1]}" in prompt or f"我是{named[1]}" in prompt
    assert recalled > 20


def test_no_braces_are_left_unfilled(pairs):
    assert not [pair for pair in pairs if re.search("[{}]", "".join(pair))]
    assert all(prompt and answer for prompt, answer in pairs)


def test_the_corpus_holds_no_advert_of_the_sample_data():
    sample = {
        json.loads(line)["summary"]
        for name in (TRAIN_NAME, DEV_NAME)
        for line in (DEFAULT_FOLDER / name).read_text(encoding="utf-8").splitlines()
    }
    corpus = {answer for _, answer in corpus_pairs(6000, seed=0)} | set(corpus_texts(2000, seed=0))
    assert not sample & corpus


def test_texts_and_pairs_of_one_seed_hold_different_adverts():
    texts = set(corpus_texts(400, seed=0))
    assert len(texts) == 400
    assert not texts & {answer for _, answer in corpus_pairs(2000, seed=0)}
    assert not texts & set(corpus_texts(400, seed=1))


def test_extra_values_are_unknown_to_adverts():
    book = adverts.phrases()
    for kind, keys in small_talk()["extra_values"].items():
        for key, values in keys.items():
            assert key in book["types"][kind]["keys"]
            known = book["type_values"].get(kind, {}).get(key, book["attributes"][key]["values"])
            assert [value for value in values if value in known] == []
