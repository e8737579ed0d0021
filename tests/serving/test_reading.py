"""Stop strings and whole characters, piece by piece."""

import random

import pytest

from chatglm_tuning.model import ChatGLMTokenizer
from chatglm_tuning.prompt import process_response
from chatglm_tuning.serving.reading import AnswerReader, StopFinder
from tests.model_folder import EMBEDDED


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer.from_pretrained(EMBEDDED)


def test_text_ends_before_the_first_stop_string_however_it_is_cut():
    generator = random.Random(0)
    for _ in range(2000):
        text = "".join(generator.choices("abc。", k=12))
        stops = ["".join(generator.choices("abc。", k=generator.randint(1, 4))) for _ in range(generator.randint(1, 4))]
        # The one that is complete first ends the text; of those, the one that begins first.
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        first = [text.find(stop) for stop in stops if stop in text and text.find(stop) + len(stop) == min(ends)]
        finder, shown = StopFinder(stops), ""
        for character in text:
            shown += finder.push(character)
            if finder.is_found:
                break
        else:
            shown += finder.flush()
        assert shown == (text[: min(first)] if ends else text), (text, stops)


def test_what_cannot_be_a_stop_string_is_given_out_at_once():
    finder = StopFinder(["。。。", "ab"])
    assert finder.push("你好。。") == "你好"
    assert finder.push("a") == "。。"
    assert finder.push("c") == "ac"
    assert StopFinder([]).push("。。。ab") == "。。。ab"


def test_pieces_joined_are_the_cleaned_text(tokenizer):
    text = "你好,这是[[训练时间]]年的裙子!\n\n  好看吗?🙂 yes, it is: \t fine;好"
    ids = tokenizer.encode_text(text)
    for is_cleaned in (True, False):
        reader = AnswerReader(tokenizer, (), is_cleaned=is_cleaned)
        shown = "".join(reader.push(token) for token in ids) + reader.finish()
        decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert shown == (process_response(decoded) if is_cleaned else decoded)
        assert reader.tokens == len(ids)
    stops = ["🙂", "2023年", "！"]
    for stop in stops:
        reader = AnswerReader(tokenizer, [stop], is_cleaned=True)
        shown = ""
        for token in ids:
            shown += reader.push(token)
            if reader.is_stopped:
                break
        assert shown == process_response(decoded).partition(stop)[0]


def test_a_character_that_is_not_whole_is_left_out(tokenizer):
    ids = tokenizer.encode_text("好🙂")
    assert tokenizer.sp_model.is_byte(ids[-1])
    for is_cleaned in (True, False):
        reader = AnswerReader(tokenizer, (), is_cleaned=is_cleaned)
        assert "".join(reader.push(token) for token in ids[:-1]) + reader.finish() == "好"


def test_a_stop_string_at_the_very_end_is_found(tokenizer):
    """What the cleaner held back to the last may be one."""
    reader = AnswerReader(tokenizer, ["!"], is_cleaned=True)
    shown = "".join(reader.push(token) for token in tokenizer.encode_text("hi!"))
    shown += reader.finish()
    assert (shown, reader.is_stopped) == ("hi", True)
