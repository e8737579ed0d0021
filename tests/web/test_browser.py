"""The chat page as a visitor sees it, in the system's Chromium."""

import threading
from types import SimpleNamespace

import pytest
import uvicorn

from chatglm_tuning.inference.engine import QueueFullError
from chatglm_tuning.web.conversation import Choices, Visit
from chatglm_tuning.web.listening import bind
from chatglm_tuning.web.page import Beginning, ChatPage
from chatglm_tuning.web.server import make_app
from chatglm_tuning.web.texts import EXAMPLES, TEXTS
from tests.web.browser import FLAGS, PHONE, Visitor, find_browser, wait_for
from tests.web.conftest import GREEDY, start_engine

QUESTION = "类型#裤*版型#宽松*风格#性感"
ZH, EN = TEXTS["zh"], TEXTS["en"]


@pytest.fixture(scope="module")
def browser():
    executable = find_browser()
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright().start()
    started = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
    yield started.new_context()  # one for all pages, whose scripts are then read once
    started.close()
    playwright.stop()


@pytest.fixture(scope="module")
def served(folders):
    """A page on the embedded base with a LoRA; a prefix is there to be added."""
    served = start_engine(max_rows=4, max_waiting=2)
    served.chat.shelf.add(folders["lora"], "lora")
    page = ChatPage(served.chat, Beginning(language="zh", max_length=GREEDY.max_length, seed=None, context=2048))
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(page), log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    wait_for(lambda: server.started, "the server")
    yield SimpleNamespace(
        chat=served.chat, engine=served.engine, served=served, address=f"http://127.0.0.1:{listener.getsockname()[1]}/"
    )
    server.should_exit = True
    served.engine.close()
    thread.join(20)


@pytest.fixture
def open_page(browser, served):
    """Opens the page; at the end nobody's console has complained, and no other host was asked."""
    served.served.delay = 0.0
    visitors = []

    def open_one(**options):
        visitors.append(Visitor(browser, served.address, **options))
        return visitors[-1]

    yield open_one
    served.served.delay = 0.0
    for visitor in visitors:
        visitor.page.close()
    for visitor in visitors:
        assert visitor.complaints == []
        assert visitor.hosts == {"127.0.0.1"}


@pytest.fixture
def visitor(open_page):
    return open_page()


def test_an_answer_streams_and_is_the_adapters(visitor, served, alone):
    visitor.set_greedy()
    served.served.delay = 0.05
    visitor.choose("left", ZH.base_alone)
    visitor.ask(QUESTION)
    seen = set()
    wait_for(lambda: seen.add(tuple(visitor.said())) or (len(seen) > 4 and visitor.is_idle()), "a growing answer")
    whole = visitor.wait_for_end(1)
    assert whole == alone("base", QUESTION)
    assert all(whole.startswith(text) for texts in seen for text in texts if text != "…")
    assert visitor.said("user") == [QUESTION]
    assert "回答完毕" in visitor.facts()
    assert "每秒" in visitor.facts()
    assert visitor.page.locator("#question textarea").input_value() == ""


def test_signs_of_markup_are_shown_as_they_are(visitor):
    question = "*版型*   <b>x</b> $a$ `c` &amp;\n  - if a < b:\n      return"
    visitor.ask(question)
    visitor.wait_for_end(1)
    assert visitor.said("user") == [question]


def test_stop_ends_at_once_and_the_next_question_is_answered(visitor, served, alone):
    visitor.set_greedy()
    served.served.delay = 0.2
    visitor.ask(QUESTION)
    wait_for(lambda: visitor.said() and len(visitor.said()[0]) > 3, "some text")
    visitor.page.locator("#stop").click()
    wait_for(visitor.is_idle, "the end", seconds=2)
    stopped = visitor.wait_for_end(1)
    assert "已停止" in visitor.facts()
    assert alone("lora", QUESTION).startswith(stopped)
    wait_for(lambda: served.engine.running == 0, "the engine's rest")
    assert visitor.said() == [stopped]
    served.served.delay = 0.0
    visitor.ask("你好")
    assert visitor.wait_for_end(2) == alone("lora", "你好", [(QUESTION, stopped)])


def test_regenerate_draws_another_answer(visitor):
    visitor.set_max_length(60)
    visitor.page.locator("#seed input, #seed textarea").fill("5")
    visitor.ask(QUESTION)
    first = visitor.wait_for_end(1)
    visitor.page.locator("#again").click()
    wait_for(lambda: visitor.is_idle() and visitor.said() not in ([first], ["…"]), "another answer")
    second = visitor.wait_for_end(1)
    assert second != first
    assert visitor.said("user") == [QUESTION]


def test_clear_forgets_and_regenerate_needs_a_question(visitor, alone):
    visitor.set_greedy()
    visitor.choose("left", ZH.base_alone)
    visitor.ask("我叫小明")
    visitor.wait_for_end(1)
    visitor.page.locator("#clear").click()
    wait_for(lambda: visitor.said() == [] and visitor.facts() == "", "an empty window")
    visitor.page.locator("#again").click()
    visitor.has_text("#notice", ZH.nothing_to_regenerate)
    visitor.ask("我叫什么名字？")
    assert visitor.wait_for_end(1) == alone("base", "我叫什么名字？")


def test_history_may_be_turned_off(visitor, alone):
    visitor.set_greedy()
    visitor.choose("left", ZH.base_alone)
    visitor.ask("我叫小明")
    first = visitor.wait_for_end(1)
    visitor.ask("我叫什么名字？")
    assert visitor.wait_for_end(2) == alone("base", "我叫什么名字？", [("我叫小明", first)])
    visitor.page.locator("#history input").uncheck()
    visitor.ask("我叫什么名字？")
    assert visitor.wait_for_end(3) == alone("base", "我叫什么名字？")


def test_another_adapter_answers_as_it_does_alone(visitor, alone):
    visitor.set_greedy()
    visitor.page.locator("#history input").uncheck()
    for rounds, (shown, name) in enumerate([("lora", "lora"), (ZH.base_alone, "base"), ("lora", "lora")], start=1):
        visitor.choose("left", shown)
        visitor.ask("你会做什么？")
        assert visitor.wait_for_end(rounds) == alone(name, "你会做什么？")
        assert visitor.facts().startswith(shown)


def test_a_folder_is_added_and_answers(open_page, folders, alone):
    visitor = open_page()
    visitor.set_greedy()
    visitor.page.locator("#folder input, #folder textarea").fill(str(folders["prefix"]))
    visitor.page.locator("#add-button").click()
    visitor.has_text("#added", "已添加：my_prefix")
    visitor.ask("你会做什么？")
    assert visitor.wait_for_end(1) == alone("prefix", "你会做什么？")
    assert visitor.facts().startswith("my_prefix")
    assert "my_prefix" in open_page().offered("left")


def test_a_wrong_folder_is_told_and_the_page_goes_on(visitor, alone, tmp_path):
    before = visitor.offered("left")
    for folder, reason in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no LoRA")):
        visitor.page.locator("#folder input, #folder textarea").fill(str(folder))
        visitor.page.locator("#add-button").click()
        visitor.has_text("#added", reason)
    assert visitor.offered("left") == before
    visitor.set_greedy()
    visitor.ask("你会做什么？")
    assert visitor.wait_for_end(1) == alone("lora", "你会做什么？")


def test_two_adapters_answer_side_by_side(visitor, served, alone):
    visitor.set_greedy()
    visitor.page.locator("#side-by-side input").check()
    visitor.page.locator("#right-chat").wait_for()
    served.served.delay = 0.05
    visitor.ask("你好")
    wait_for(
        lambda: all(visitor.said(side=side) not in ([], ["…"]) for side in ("left", "right")) and not visitor.is_idle(),
        "both windows being written",
    )
    served.served.delay = 0.0
    assert visitor.wait_for_end(1, "left") == alone("lora", "你好")
    assert visitor.wait_for_end(1, "right") == alone("base", "你好")
    assert visitor.facts("right").startswith(ZH.base_alone)
    visitor.page.locator("#side-by-side input").uncheck()
    wait_for(lambda: not visitor.page.locator("#right-chat").is_visible(), "one window")


def test_an_example_fills_the_question(visitor):
    visitor.page.locator("#examples").get_by_text(EXAMPLES[0]).click()
    wait_for(lambda: visitor.page.locator("#question textarea").input_value() == EXAMPLES[0], "the example")


def test_the_language_is_switched_for_one_visitor(open_page):
    first, second = open_page(), open_page()
    first.set_max_length(48)
    first.ask("你好")
    first.wait_for_end(1)
    first.page.get_by_label("English").check()
    first.has_text("#send", EN.send)
    first.has_text("#left-facts", "tokens")
    for text in (EN.history, EN.side_by_side, EN.sampling, EN.greedy, EN.top_p, EN.add, EN.examples, EN.adapter):
        assert first.page.get_by_text(text, exact=True).first.is_visible(), text
    words = first.page.locator("body").inner_text()
    for text in (ZH.history, ZH.send, ZH.examples, ZH.folder, ZH.top_p_hint):
        assert text not in words
    first.ask("裤" * 60)
    first.has_text("#notice", "too long: 6[0-9] tokens")
    second.has_text("#send", ZH.send)


def test_mistakes_are_told_and_the_page_goes_on(visitor):
    visitor.page.locator("#send").click()
    visitor.has_text("#notice", ZH.empty_question)
    visitor.ask("裤" * 200)
    visitor.has_text("#notice", "问题太长：共 20[0-9] 个 token.*80")
    assert visitor.page.locator("#question textarea").input_value() == "裤" * 200
    visitor.page.locator("#seed input, #seed textarea").fill("-1")
    visitor.ask("你好")
    visitor.has_text("#notice", ZH.bad_seed)
    visitor.page.locator("#seed input, #seed textarea").fill("")
    visitor.ask("你好")
    visitor.wait_for_end(1)
    assert visitor.page.locator("#notice p").count() == 0


def test_two_visitors_at_once_and_a_full_engine(open_page, served, alone):
    first, second = open_page(), open_page()
    first.set_greedy()
    second.set_greedy()
    served.served.delay = 0.05
    first.ask(QUESTION)
    second.ask("你好")
    wait_for(lambda: served.engine.running == 2, "two answers at once")
    served.served.delay = 0.0
    assert first.wait_for_end(1) == alone("lora", QUESTION)
    assert second.wait_for_end(1) == alone("lora", "你好")
    with served.engine.paused():
        with pytest.raises(QueueFullError):
            ask_until_refused(served.chat)
        second.ask("你会做什么？")
        second.has_text("#notice", ZH.full)
    second.page.locator("#send").click()
    assert second.wait_for_end(2) == alone("lora", "你会做什么？", [("你好", alone("lora", "你好"))])


def ask_until_refused(chat):
    while True:
        chat.ask(Visit(), "你好", Choices(adapters=("lora",), keeps_history=False, settings=GREEDY))


def test_a_page_that_is_closed_ends_its_answer(open_page, served):
    visitor = open_page()
    served.served.delay = 0.1
    visitor.ask(QUESTION)
    wait_for(lambda: served.engine.running == 1, "an answer")
    visitor.page.close()
    wait_for(lambda: served.engine.running == 0, "its end", seconds=5)


def test_a_phone_shows_all_of_it_without_scrolling_sideways(open_page):
    visitor = open_page(viewport=PHONE)
    visitor.page.locator("#side-by-side input").check()
    visitor.page.locator("#right-chat").wait_for()
    visitor.set_max_length(64)
    visitor.ask(QUESTION)
    visitor.wait_for_end(1, "right")
    assert_fits(visitor, PHONE["width"])
    visitor.page.get_by_label("English").check()
    visitor.has_text("#send", EN.send)
    assert_fits(visitor, PHONE["width"])


def assert_fits(visitor, width):
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("heading", "left-chat", "right-chat", "question", "send", "again", "clear", "seed", "add-button"):
        box = visitor.page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= width, name
        assert visitor.page.locator(f"#{name}").evaluate("e => e.scrollWidth <= e.clientWidth"), name
    assert visitor.page.locator("#heading h1").evaluate("e => e.scrollWidth <= e.closest('#heading').clientWidth")
