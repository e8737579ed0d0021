"""Cleaning a reply while it is written, against cleaning it as a whole."""

import itertools
import random
import time

from chatglm_tuning.inference.reply import ReplyCleaner
from chatglm_tuning.prompt import process_response


def clean(pieces):
    cleaner = ReplyCleaner()
    return "".join([*map(cleaner.push, pieces), cleaner.flush()])


def test_released_cases_fed_by_characters(golden):
    for raw, expected in golden.json("generation")["process_response"]:
        assert clean(raw) == expected


def test_every_short_text_in_every_order_of_what_matters():
    for length in range(5):
        for characters in itertools.product("中a,! [", repeat=length):
            text = "".join(characters)
            assert clean(text) == process_response(text), repr(text)


def test_random_texts_in_random_pieces():
    rng = random.Random(7)
    parts = [
        "中",
        "文",
        "a",
        "1",
        ",",
        "!",
        ":",
        ";",
        "?",
        "，",
        " ",
        "\n",
        "\u3000",
        "[",
        "]",
        "[[",
        "训练时间",
        "间]]",
    ]
    parts += ["[[训练时间]]"]
    for _ in range(5000):
        pieces = ["".join(rng.choices(parts, k=rng.randint(0, 4))) for _ in range(rng.randint(0, 8))]
        text = "".join(pieces)
        assert clean(pieces) == process_response(text), repr(pieces)


def test_only_what_may_change_is_held_back():
    cleaner = ReplyCleaner()
    shown = [cleaner.push(character) for character in "  你好, world! [[训练时间]]好."]
    written = list("  你好, world! [[训练时间]]好.")
    assert [(a, b) for a, b in zip(written, shown, strict=True) if a != b] == [
        *((" ", ""),) * 2,
        *((",", ""), (" ", ""), ("w", "， w")),
        *((a, "") for a in "! [[训练时间]"),
        ("]", "! 2023年"),
    ]
    assert cleaner.flush() == ""


def test_a_cleaner_starts_anew_after_flush():
    cleaner = ReplyCleaner()
    cleaner.push("你")
    cleaner.flush()
    assert cleaner.push(" ,") + cleaner.flush() == ","


def test_long_runs_take_no_time():
    start = time.process_time()
    assert clean(["[" * 3000 + "x", " " * 3000 + "x"]) == "[" * 3000 + "x" + " " * 3000 + "x"
    assert time.process_time() - start < 5
