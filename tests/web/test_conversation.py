"""Answers, windows and the shelf of adapters, without a page."""

import asyncio
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from chatglm_tuning.checkpoint import Manifest, write_manifest
from chatglm_tuning.errors import UserError
from chatglm_tuning.inference.engine import EngineClosedError, QueueFullError
from chatglm_tuning.web.conversation import Choices, QuestionLengthError, Visit, watch
from chatglm_tuning.web.shelf import BASE_NAME
from chatglm_tuning.web.texts import TEXTS
from tests.web.conftest import GREEDY, start_engine

QUESTION = "类型#裤*版型#宽松*风格#性感"


@pytest.fixture(scope="module")
def served(folders):
    served = start_engine()
    for name, folder in folders.items():
        served.chat.shelf.add(folder, name)
    yield served
    served.engine.close()


@pytest.fixture(autouse=True)
def at_full_speed(served):
    served.delay = 0.0


def choose(*adapters, settings=GREEDY, keeps_history=True):
    return Choices(adapters=adapters or (BASE_NAME,), keeps_history=keeps_history, settings=settings)


def finish(visit):
    deadline = time.monotonic() + 30
    while visit.is_writing:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return [answer.text for answer in visit.last_answers]


@pytest.mark.parametrize("name", ["base", "lora", "prefix"])
def test_an_answer_is_what_the_adapter_answers_alone(served, alone, name):
    visit = Visit()
    served.chat.ask(visit, QUESTION, choose(BASE_NAME if name == "base" else name))
    [text] = finish(visit)
    assert text == alone(name, QUESTION)
    [answer] = visit.last_answers
    assert answer.reason in ("stop", "length")
    assert answer.tokens_per_second > 0


def test_the_adapters_answer_differently(alone):
    assert len({alone(name, QUESTION) for name in ("base", "lora", "prefix")}) == 3


def test_two_windows_answer_at_the_same_time(served, alone):
    visit = Visit()
    served.chat.ask(visit, QUESTION, choose("lora", BASE_NAME))
    assert finish(visit) == [alone("lora", QUESTION), alone("base", QUESTION)]


def test_history_is_seen_or_not(served, alone):
    told, asked = "我叫小明", "我叫什么名字？"
    for keeps_history in (True, False):
        visit = Visit()
        served.chat.ask(visit, told, choose())
        finish(visit)
        first = visit.windows[0][0].answer.text
        served.chat.ask(visit, asked, choose(keeps_history=keeps_history))
        assert finish(visit) == [alone("base", asked, [(told, first)] if keeps_history else [])]
    assert alone("base", asked, [(told, first)]) != alone("base", asked)


def test_a_stopped_answer_keeps_what_came(served, alone):
    served.delay = 0.05
    visit = Visit()
    served.chat.ask(visit, QUESTION, choose())
    [answer] = visit.last_answers
    while answer.tokens < 5:
        time.sleep(0.01)
    visit.stop()
    text = answer.text
    assert answer.reason == "cancelled"
    assert text
    assert text != alone("base", QUESTION)
    assert alone("base", QUESTION).startswith(text)
    time.sleep(0.2)
    assert answer.text == text
    served.delay = 0.0
    served.chat.ask(visit, "你好", choose())
    assert finish(visit) == [alone("base", "你好", [(QUESTION, text)])]


def test_answering_again_draws_with_another_seed(served):
    settings = replace(GREEDY, do_sample=True, temperature=2.0, seed=3)
    visit = Visit()
    served.chat.ask(visit, "你会做什么？", choose("prefix", settings=settings))
    [first] = finish(visit)
    served.chat.answer_again(visit, choose("prefix", settings=settings))
    [second] = finish(visit)
    assert len(visit.windows[0]) == 1
    assert second != first
    other = Visit()
    served.chat.ask(other, "你会做什么？", choose("prefix", settings=replace(settings, seed=4)))
    assert finish(other) == [second]
    visit.clear()
    served.chat.ask(visit, "你会做什么？", choose("prefix", settings=settings))
    assert finish(visit) == [first]


def test_the_right_window_goes_on_from_the_left_one(served, alone):
    visit = Visit()
    served.chat.ask(visit, QUESTION, choose("lora"))
    finish(visit)
    visit.show_right(True)
    assert visit.windows[1] == visit.windows[0]
    served.chat.answer_again(visit, choose("lora", "prefix"))
    assert finish(visit) == [alone("lora", QUESTION), alone("prefix", QUESTION)]
    visit.show_right(False)
    assert visit.windows[1] == []
    assert len(visit.windows[0]) == 1


def test_a_question_that_is_too_long_changes_nothing(served):
    visit = Visit()
    served.chat.ask(visit, QUESTION, choose())
    finish(visit)
    tokens = len(served.base.tokenizer.encode_text("裤" * 200)) + 2
    with pytest.raises(QuestionLengthError) as caught:
        served.chat.ask(visit, "裤" * 200, choose())
    assert (caught.value.tokens, caught.value.limit) == (tokens, GREEDY.max_length)
    assert len(visit.windows[0]) == 1


def test_old_rounds_that_do_not_fit_are_counted(served):
    visit = Visit()
    short = replace(GREEDY, max_length=48)
    for _ in range(4):
        served.chat.ask(visit, "你好", choose(settings=short))
        finish(visit)
    assert 0 < visit.last_answers[0].dropped_rounds < 4


def test_a_full_and_a_closed_engine_refuse_both_windows():
    served = start_engine(max_rows=1, max_waiting=2)
    visits: list[Visit] = []

    def ask(*adapters):
        visits.append(Visit())
        served.chat.ask(visits[-1], "你好", choose(*adapters))

    def ask_until_refused():
        while True:
            ask(BASE_NAME)

    with served.engine.paused(), pytest.raises(QueueFullError):
        ask_until_refused()
    room = len(visits) - 1
    finish_all(visits)
    with served.engine.paused():
        for _ in range(room - 1):
            ask(BASE_NAME)
        with pytest.raises(QueueFullError):
            ask(BASE_NAME, BASE_NAME)
        assert visits[-1].windows == ([], [])
    finish_all(visits)
    served.engine.close()
    with pytest.raises(EngineClosedError):
        ask(BASE_NAME)


def finish_all(visits):
    for visit in visits:
        finish(visit)


def test_a_page_that_goes_away_ends_its_answers(served):
    served.delay = 0.05
    visit = Visit()
    served.chat.ask(visit, QUESTION, choose())

    async def look_once():
        looks = watch(visit)
        await anext(looks)
        await looks.aclose()

    asyncio.run(look_once())
    assert not visit.is_writing
    assert visit.last_answers[0].reason == "cancelled"


def test_a_folder_is_added_while_answers_are_written(folders, alone, tmp_path):
    served = start_engine()
    served.delay = 0.02
    visit = Visit()
    served.chat.ask(visit, QUESTION, choose())
    added = []
    thread = threading.Thread(target=lambda: added.append(served.chat.shelf.add(folders["lora"])))
    thread.start()
    thread.join(20)
    was_writing = visit.is_writing
    assert added == ["my-lora"]
    assert was_writing
    assert finish(visit) == [alone("base", QUESTION)]
    served.engine.close()


def test_a_folder_is_loaded_once_unless_it_changed(served, folders, tmp_path):
    shelf = served.chat.shelf
    copy = tmp_path / "lora"
    copy.mkdir()
    for path in folders["lora"].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    first = shelf.add(copy)
    assert first == "lora (2)"
    assert shelf.add(copy) == first
    config = copy / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    assert shelf.add(copy) == "lora (3)"


def test_a_folder_that_is_given_two_names_has_both(served, folders):
    shelf = served.chat.shelf
    loaded = served.base.model
    before = sum(parameter.numel() for parameter in loaded.parameters())
    assert shelf.add(folders["lora"], "another") == "another"
    assert shelf["another"] is shelf["lora"]
    assert shelf.add(folders["lora"], "another") == "another"
    assert shelf.add(folders["lora"]) == "lora"
    assert sum(parameter.numel() for parameter in loaded.parameters()) == before


def test_an_adapter_of_another_base_or_precision_is_told_of(served, folders, tmp_path):
    shelf, identity = served.chat.shelf, served.base.identity
    told = {}
    for name, changes in {"same": {}, "int4": {"quantization_bit": 4}, "other": {"fingerprint": "f"}}.items():
        copy = shutil.copytree(folders["lora"], tmp_path / name)
        write_manifest(copy, Manifest("lora", replace(identity, **changes)), [path.name for path in copy.iterdir()])
        unlike = shelf.unlike(shelf.add(copy))
        told[name] = [TEXTS[language].unlike(unlike, shelf.bits) for language in ("zh", "en")]
    assert told["same"] == ["", ""]
    assert "在 int4 的原模型上训练，而这里的原模型是全精度" in told["int4"][0]
    assert "trained on a base in int4, and this one is in full precision" in told["int4"][1]
    assert "在这个原模型上训练" in told["other"][0]
    assert "trained on this base model" in told["other"][1]
    assert TEXTS["zh"].unlike(shelf.unlike("int4"), 8).endswith("这里的原模型是 int8，回答会有差别。")


@pytest.mark.parametrize("folder", ["nowhere", ""])
def test_what_is_no_adapter_is_refused(served, folder, tmp_path):
    names = served.chat.shelf.names
    with pytest.raises(UserError):
        served.chat.shelf.add(tmp_path / Path(folder))
    assert served.chat.shelf.names == names
