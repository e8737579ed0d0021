"""Ids and labels of an example, the two limits, shortened histories, and the report of lengths."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_tuning.data.encode import (
    IGNORED_LABEL,
    EncodingSettings,
    encode_example,
    encode_examples,
    fit_history,
    report_lengths,
)
from chatglm_tuning.data.records import Example, read_records
from chatglm_tuning.errors import UserError
from chatglm_tuning.prompt import build_prompt
from tests.data.fakes import CharacterEncoder

FAKE = CharacterEncoder()
GMASK, SOP, EOP = FAKE.gmask_token_id, FAKE.bos_token_id, FAKE.eos_token_id
ROUNDS = (("q1", "a1"), ("q2", "a2" * 20), ("q3", "a3"))


@pytest.fixture(scope="module")
def tokenizer(shared):
    from chatglm_tuning.model.tokenization import ChatGLMTokenizer

    return ChatGLMTokenizer.from_pretrained(shared / "chatglm-6b")


def test_an_example_within_the_limits_is_whole():
    encoded = encode_example([1, 2, 3], [7, 8], FAKE, EncodingSettings(4, 4))
    assert encoded.input_ids == [1, 2, 3, GMASK, SOP, 7, 8, EOP]
    assert encoded.labels == [IGNORED_LABEL] * 4 + [SOP, 7, 8, EOP]
    assert (encoded.is_prompt_cut, encoded.is_answer_cut) == (False, False)


def test_a_prompt_that_is_too_long_is_cut_at_its_end():
    encoded = encode_example([1, 2, 3, 4], [7, 8], FAKE, EncodingSettings(4, 4))
    assert encoded.input_ids == [1, 2, 3, GMASK, SOP, 7, 8, EOP]
    assert (encoded.is_prompt_cut, encoded.is_answer_cut, encoded.prompt_tokens) == (True, False, 4)


@pytest.mark.parametrize("eop_after_cut", [False, True])
def test_an_answer_that_was_cut_gets_no_eop_unless_asked_for(eop_after_cut):
    encoded = encode_example([1], [7, 8, 9], FAKE, EncodingSettings(4, 4, eop_after_cut=eop_after_cut))
    end = [EOP] if eop_after_cut else []
    assert encoded.input_ids == [1, GMASK, SOP, 7, 8, *end]
    assert encoded.labels == [IGNORED_LABEL, IGNORED_LABEL, SOP, 7, 8, *end]
    assert (encoded.is_prompt_cut, encoded.is_answer_cut, encoded.answer_tokens) == (False, True, 3)


@pytest.mark.parametrize(("limits", "flag"), [((1, 9), "--max_input_length"), ((9, 2), "--max_output_length")])
def test_limits_without_room_for_text_are_refused(limits, flag):
    with pytest.raises(UserError, match=rf"{flag}: {min(limits)} leaves no room for text"):
        EncodingSettings(*limits)


@pytest.mark.parametrize("kept", range(len(ROUNDS) + 1))
def test_the_oldest_rounds_go_first_and_the_rest_is_what_chat_sends(kept):
    shorter = ROUNDS[len(ROUNDS) - kept :]
    room = len(build_prompt("q4", shorter))
    assert fit_history("q4", ROUNDS, room, len) == shorter
    assert fit_history("q4", ROUNDS, room - 1, len) == shorter[1:]
    [encoded] = encode_examples([Example("q4", "a4", ROUNDS)], FAKE, EncodingSettings(room + 1, 9))
    assert "".join(map(chr, encoded.input_ids[:room])) == build_prompt("q4", shorter)
    assert encoded.input_ids[room:] == [GMASK, SOP, ord("a"), ord("4"), EOP]
    assert (encoded.is_prompt_cut, encoded.dropped_rounds) == (False, len(ROUNDS) - kept)
    assert encoded.prompt_tokens == len(build_prompt("q4", ROUNDS))


def test_a_query_that_is_too_long_by_itself_loses_all_rounds_and_is_cut():
    assert fit_history("query", ROUNDS, 4, len) == ()
    [encoded] = encode_examples([Example("query", "a", ROUNDS)], FAKE, EncodingSettings(5, 9))
    assert "".join(map(chr, encoded.input_ids[:4])) == "quer"
    assert (encoded.is_prompt_cut, encoded.dropped_rounds) == (True, 3)


def columns_of(encoded):
    names = ("prompt_tokens", "answer_tokens", "is_prompt_cut", "is_answer_cut", "dropped_rounds")
    columns = {name: np.array([getattr(row, name) for row in encoded]) for name in names}
    return columns | {"length": np.array([len(row.input_ids) for row in encoded])}


def test_the_report_counts_what_was_cut_and_the_lengths_it_names_cut_nothing():
    examples = [Example("q" * 9, "a"), Example("q", "a" * 9), Example("q", "a", (("q", "a"),)), Example("qq", "aaa")]
    report = report_lengths(columns_of(encode_examples(examples, FAKE, EncodingSettings(6, 6))))
    assert (report.rows, report.cut_prompts, report.cut_answers, report.shortened_histories) == (4, 1, 1, 1)
    assert report.longest_answer == 9
    assert report.mean_answer == 3.5
    assert report.longest_sequence == 9
    assert report.total_tokens == 9 + 7 + 5 + 8
    enough = EncodingSettings(report.enough_input_length, report.enough_output_length)
    again = report_lengths(columns_of(encode_examples(examples, FAKE, enough)))
    assert (again.cut_prompts, again.cut_answers, again.shortened_histories) == (0, 0, 0)
    for smaller in (
        EncodingSettings(enough.max_input_length - 1, enough.max_output_length),
        EncodingSettings(enough.max_input_length, enough.max_output_length - 1),
    ):
        less = report_lengths(columns_of(encode_examples(examples, FAKE, smaller)))
        assert less.cut_prompts + less.cut_answers + less.shortened_histories > 0
    assert f"--max_input_length {report.enough_input_length} --max_output_length 11 would cut none" in report.describe()


def seed_text(example):
    addition = example.get("input") or ""
    return example["instruction"] + (f"\n{addition}" if addition.strip() else "")


def test_the_originals_rows_are_reproduced(golden, tokenizer):
    rows = golden.json("tokenizer")["seed_preprocess"]
    assert rows
    for row in rows:
        # The original encoded with control words in the text turned into control tokens.
        prompt_ids = tokenizer.encode(seed_text(row["example"]), add_special_tokens=False)
        answer_ids = tokenizer.encode(row["example"]["output"], add_special_tokens=False)
        limits = EncodingSettings(row["max_input_length"], row["max_output_length"], eop_after_cut=True)
        encoded = encode_example(prompt_ids, answer_ids, tokenizer, limits)
        assert encoded.input_ids == row["input_ids"]
        # The original looked for the first <sop>, which a text could hold; ours is the one that we put there.
        if "<sop>" not in row["example"]["instruction"]:
            assert encoded.labels == row["labels"]


def test_our_own_rows_are_the_originals_where_nothing_is_cut_and_no_control_word_is_in_the_text(
    golden, tokenizer, tmp_path
):
    rows = [
        row
        for row in golden.json("tokenizer")["seed_preprocess"]
        if row["max_input_length"] > 16
        and row["example"]["output"]
        and row["example"]["instruction"]
        and "<sop>" not in row["example"]["instruction"]
    ]
    assert len(rows) >= 5
    file = tmp_path / "seed.jsonl"
    file.write_text("".join(json.dumps(row["example"]) + "\n" for row in rows), encoding="utf-8")
    encoded = encode_examples(read_records([file]).examples, tokenizer, EncodingSettings(1024, 1024))
    assert [row.input_ids for row in encoded] == [row["input_ids"] for row in rows]
    assert [row.labels for row in encoded] == [row["labels"] for row in rows]


def test_a_turn_of_a_conversation_has_the_ids_that_chat_sends(golden, tokenizer, tmp_path):
    turns = [("你好", "你好！"), ("介绍一下 自己", "我是助手\n\n很高兴"), ("再见", "再见")]
    names = [("user", "assistant")] * len(turns)
    messages = [
        {"role": role, "content": text}
        for turn, roles in zip(turns, names, strict=True)
        for role, text in zip(roles, turn, strict=True)
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    encoded = encode_examples(read_records([file]).examples, tokenizer, EncodingSettings(1024, 1024))
    for number, row in enumerate(encoded):
        # What chat gives to the tokenizer is `X [gMASK] <sop>`, once its prompt is built.
        sent = tokenizer(build_prompt(turns[number][0], turns[:number]))["input_ids"]
        assert row.input_ids[: len(sent)] == sent
        assert row.labels[len(sent) - 1] == tokenizer.bos_token_id


CONTROL_WORDS = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<pad>", "<unk>", "<s>", "</s>", "<unused_0>"]
PIECES = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.sampled_from(CONTROL_WORDS))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(texts=st.lists(st.lists(PIECES, max_size=6).map("".join), min_size=2, max_size=2))
def test_no_text_becomes_a_control_token(tokenizer, texts):
    [encoded] = encode_examples([Example(texts[0], texts[1])], tokenizer, EncodingSettings(4096, 4096))
    context = encoded.labels.index(tokenizer.bos_token_id)
    words = encoded.input_ids[: context - 1] + encoded.input_ids[context + 1 : -1]
    control = {tokenizer.convert_tokens_to_ids(word) for word in CONTROL_WORDS} - {tokenizer.unk_token_id}
    assert not control & set(words)
    assert encoded.input_ids[context - 1 : context + 1] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert encoded.input_ids[-1] == tokenizer.eos_token_id


def test_dropping_a_round_always_shortens_the_prompt(tokenizer):
    # What the halving search of fit_history relies on; ten rounds more make the numbers a digit longer.
    rounds = [(f"问{i}", "") for i in range(25)]
    lengths = [
        len(ids) for ids in tokenizer.encode_texts([build_prompt("问", rounds[dropped:]) for dropped in range(26)])
    ]
    assert all(longer > shorter for longer, shorter in pairwise(lengths))
