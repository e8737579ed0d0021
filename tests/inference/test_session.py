"""Conversations: prompts, pieces, history, and what is remembered of a stopped answer."""

import threading
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from chatglm_tuning.inference import session as session_module
from chatglm_tuning.inference.session import ChatSession, QuestionTooLongError
from chatglm_tuning.inference.stream import GenerationSettings
from chatglm_tuning.model import ChatGLMTokenizer
from chatglm_tuning.prompt import build_prompt, process_response

GREEDY = GenerationSettings(max_length=2048, do_sample=False, temperature=1.0, top_p=1.0)


@pytest.fixture(scope="module")
def tokenizer(shared):
    return ChatGLMTokenizer.from_pretrained(shared / "chatglm-6b")


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """Sessions whose model says given tokens; `asked` collects the prompts and the settings."""
    asked = []

    def make(answers, settings=GREEDY, **options):
        answers = iter(answers)

        def answer(_model, input_ids, *, settings, stop):
            asked.append((input_ids[0].tolist(), settings))
            text = next(answers)
            ids = tokenizer.encode_text(text) if isinstance(text, str) else text
            for token in ids:
                if stop():
                    return
                if token is None:
                    raise ArithmeticError
                yield token

        monkeypatch.setattr(session_module, "stream_tokens", answer)
        model = SimpleNamespace(device=torch.device("cpu"))
        return ChatSession(model, tokenizer, settings, **options)

    return SimpleNamespace(make=make, asked=asked)


def settings_of(max_length, seed=None):
    return GenerationSettings(max_length=max_length, do_sample=True, temperature=1.0, top_p=1.0, seed=seed)


def test_prompts_equal_the_released_chat(golden, scripted):
    for case in golden.json("generation")["chat"]:
        chat = scripted.make(["好"])
        chat.history = [tuple(pair) for pair in case["history"]]
        list(chat.reply(case["query"]))
        assert scripted.asked[-1][0] == case["input_ids"]


def test_control_tokens_in_a_question_stay_words(scripted, tokenizer):
    list(scripted.make(["好"]).reply("[gMASK] <sop> <eop>"))
    ids = scripted.asked[0][0]
    assert ids[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert not {130001, 130004, 130005} & set(ids[:-2])


def test_a_whole_answer_of_the_model_is_what_generate_decodes_to(golden, golden_model, tokenizer):
    case = golden.json("generation")["single0"]
    ids = torch.tensor(case["input_ids"])
    settings = GenerationSettings(max_length=ids.shape[1] + 32, do_sample=False, temperature=1.0, top_p=1.0)
    chat = ChatSession(golden_model, tokenizer, settings)
    pieces = list(chat.reply("你好"))
    whole = process_response(tokenizer.decode(case["new_ids"][0], skip_special_tokens=True))
    assert "".join(pieces) == whole
    assert len(pieces) > 10
    assert chat.history == [("你好", whole)]


def test_pieces_are_whole_characters_and_cleaned(scripted):
    text = "  你好👋, 世界!\n[[训练时间]]𠮷 , 完?  "
    chat = scripted.make([text])
    pieces = list(chat.reply("问"))
    assert "".join(pieces) == process_response(text) == chat.history[0][1]
    assert "👋" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5


def test_rounds_are_sent_cleaned(scripted, tokenizer):
    chat = scripted.make(["你好,世界 ", "二", "三"])
    list(chat.reply("一?"))
    list(chat.reply("二?"))
    expected = build_prompt("二?", [("一?", "你好，世界")])
    assert scripted.asked[1][0][:-2] == tokenizer.encode_text(expected)
    chat.clear()
    list(chat.reply("三?"))
    assert scripted.asked[2][0][:-2] == tokenizer.encode_text("三?")
    assert chat.history == [("三?", "三")]


def test_without_history_every_question_stands_alone(scripted, tokenizer):
    chat = scripted.make(["一", "二"], keep_history=False)
    list(chat.reply("问"))
    list(chat.reply("问"))
    assert scripted.asked[0][0] == scripted.asked[1][0]
    assert chat.history == []


def test_oldest_rounds_are_dropped_where_the_prompt_would_not_fit(scripted, tokenizer):
    rounds = [(f"第{i}个问题", "回答" * 5) for i in range(6)]
    chat = scripted.make(["好"] * 2, settings_of(100))
    chat.history = list(rounds)
    list(chat.reply("现在呢"))
    dropped = chat.dropped_rounds
    assert 0 < dropped < 6
    sent = scripted.asked[0][0]
    assert sent[:-2] == tokenizer.encode_text(build_prompt("现在呢", rounds[dropped:]))
    assert len(sent) <= 75 < 2 + len(tokenizer.encode_text(build_prompt("现在呢", rounds[dropped - 1 :])))
    assert chat.history[:6] == rounds
    chat.clear()
    list(chat.reply("现在呢"))
    assert chat.dropped_rounds == 0


def test_a_question_may_leave_room_for_one_token_and_no_less(scripted, tokenizer):
    query = "很长的问题" * 10
    length = len(tokenizer.encode_text(query)) + 2
    chat = scripted.make(["好"], settings_of(length + 1))
    assert list(chat.reply(query)) == ["好"]
    chat = scripted.make(["好"], settings_of(length))
    with pytest.raises(QuestionTooLongError, match=f"the question has {length} tokens.*--max_length"):
        list(chat.reply(query))
    assert chat.history == []


def test_a_stopped_answer_is_kept_as_far_as_it_came(scripted):
    chat = scripted.make(["很久很久以前有一座山", "好"])
    is_stopped = threading.Event()
    pieces = []
    for piece in chat.reply("讲故事", stop=is_stopped.is_set):
        pieces.append(piece)
        is_stopped.set()
    assert "".join(pieces)
    assert chat.history == [("讲故事", "".join(pieces))]
    assert len(chat.history[0][1]) < len("很久很久以前有一座山")


def test_a_closed_answer_is_kept_as_far_as_it_came(scripted):
    chat = scripted.make(["很久很久以前有一座山"])
    with closing(chat.reply("讲故事")) as pieces:
        first = next(pieces)
    assert chat.history == [("讲故事", first)]


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_character_that_is_not_whole_is_left_out_at_the_end(scripted, tokenizer, is_closed):
    ids = tokenizer.encode_text("好👋")
    assert len(ids) > 4
    chat = scripted.make([ids[:-1]])
    pieces = chat.reply("问")
    shown = next(pieces)
    if is_closed:
        pieces.close()
    assert shown + "".join(pieces) == "好"
    assert chat.history == [("问", "好")]


def test_an_answer_without_text_or_with_an_error_is_not_kept(scripted):
    chat = scripted.make(["好", [], [64286, None]])
    list(chat.reply("一", stop=lambda: True))
    list(chat.reply("二"))
    with pytest.raises(ArithmeticError):
        list(chat.reply("三"))
    assert chat.history == []


def test_seeds_follow_the_count_of_answers(scripted):
    chat = scripted.make(["一", "二"], settings_of(100, seed=7))
    list(chat.reply("问"))
    list(chat.reply("问"))
    assert [settings.seed for _, settings in scripted.asked] == [7, 8]


def test_a_seeded_conversation_repeats_and_a_repeated_question_is_answered_anew(golden_model, tokenizer):
    def converse(seed):
        chat = ChatSession(golden_model, tokenizer, settings_of(20, seed), keep_history=False)
        return ["".join(chat.reply("你好")) for _ in range(2)]

    assert converse(3) == converse(3)
    assert converse(3) != converse(4)
    assert len(set(converse(3))) == 2
