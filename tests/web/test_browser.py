"""The chat page as a visitor sees it, in the system's Chromium."""

import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import uvicorn

from chatglm_tuning.checkpoint import Manifest, write_manifest
from chatglm_tuning.inference.engine import QueueFullError
from chatglm_tuning.listening import listen
from chatglm_tuning.loading import load_base
from chatglm_tuning.web.conversation import Choices, Visit
from chatglm_tuning.web.page import Beginning, ChatPage
from chatglm_tuning.web.server import make_app
from chatglm_tuning.web.texts import EXAMPLES, TEXTS
from tests.model_folder import EMBEDDED
from tests.web.browser import FLAGS, PHONE, Visitor, find_browser, wait_for
from tests.web.conftest import GREEDY, start_engine

QUESTION = "类型#裤*版型#宽松*风格#性感"
ZH, EN = TEXTS["zh"], TEXTS["en"]
WRONG = "rgb(185, 28, 28)"
CONTRAST = 4.5  # WCAG 2.2, 1.4.3


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
    with run_server(served) as (_, address):
        yield SimpleNamespace(chat=served.chat, engine=served.engine, served=served, address=address)


@contextmanager
def run_server(served):
    page = ChatPage(served.chat, Beginning(language="zh", max_length=GREEDY.max_length, seed=None, context=2048))
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(make_app(page), log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started, "the server")
        yield server, f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
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
    assert visitor.question.input_value() == ""


def test_enter_sends_shift_enter_starts_a_line_and_an_input_method_keeps_its_own_enter(visitor):
    visitor.question.fill("你好")
    visitor.question.press("Shift+Enter")
    assert visitor.question.input_value() == "你好\n"
    visitor.page.keyboard.type("a")
    compose = visitor.page.context.new_cdp_session(visitor.page)
    compose.send("Input.imeSetComposition", {"text": "nihao", "selectionStart": 5, "selectionEnd": 5})
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    compose.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **key})
    compose.send("Input.insertText", {"text": "b"})
    compose.send("Input.dispatchKeyEvent", {"type": "keyUp", **key})
    assert visitor.question.input_value() == "你好\nab"
    assert visitor.said("user") == []
    visitor.question.press("Enter")
    visitor.wait_for_end(1)
    assert visitor.said("user") == ["你好\nab"]
    assert visitor.question.input_value() == ""


def test_what_is_asked_while_an_answer_is_written_is_kept(visitor, served, alone):
    visitor.set_greedy()
    served.served.delay = 0.05
    visitor.ask(QUESTION)
    wait_for(lambda: visitor.said() not in ([], ["…"]), "some text")
    visitor.question.fill("你好")
    visitor.question.press("Enter")
    visitor.has_text("#notice", ZH.busy)
    assert color_of(visitor, "#notice p") != WRONG
    assert visitor.question.input_value() == "你好"
    served.served.delay = 0.0
    first = visitor.wait_for_end(1)
    assert first == alone("lora", QUESTION)
    wait_for(lambda: visitor.page.locator("#notice p").count() == 0, "no message any more")
    visitor.question.press("Enter")
    assert visitor.wait_for_end(2) == alone("lora", "你好", [(QUESTION, first)])
    assert visitor.page.locator("#notice p").count() == 0
    visitor.page.locator("#again").click()
    visitor.has_text("#notice", ZH.same_again)
    assert color_of(visitor, "#notice p") != WRONG


def test_the_keyboard_keeps_its_place(visitor, served):
    served.served.delay = 0.05
    focused = "document.activeElement.closest('[id]').id"
    visitor.question.fill(QUESTION)
    visitor.page.keyboard.press("Tab")
    assert visitor.page.evaluate(focused) == "send"
    visitor.page.keyboard.press("Enter")
    wait_for(lambda: visitor.page.evaluate(focused) == "stop", "the focus on Stop")
    assert visitor.page.locator("#stop").evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    wait_for(lambda: visitor.said() not in ([], ["…"]), "some text")
    visitor.page.keyboard.press("Enter")
    wait_for(visitor.is_idle, "the end")
    wait_for(
        lambda: visitor.page.evaluate("document.activeElement === document.querySelector('#question textarea')"), ""
    )
    assert "已停止" in visitor.facts()


def test_the_focus_is_seen_everywhere(visitor):
    seen = {}
    visitor.page.locator("#language input:checked").focus()
    for _ in range(30):
        name, outline = visitor.page.evaluate(SEEN_FOCUS)
        seen[name] = seen.get(name, True) and outline  # a slider has its number beside it
        visitor.page.keyboard.press("Tab")
    for name in (
        "language",
        "left-adapter",
        "question",
        "send",
        "history",
        "greedy",
        "temperature",
        "seed",
        "add-button",
    ):
        assert seen[name], (name, seen)


# The place of the focus, and whether it is outlined; a text field has a border and a shadow of another colour.
SEEN_FOCUS = """() => {
  const active = document.activeElement, id = active.closest("[id]:not([id^=range], [id^=component])")?.id;
  const around = [active];
  while (around.length < 4 && around.at(-1).parentElement) around.push(around.at(-1).parentElement);
  if (around.some((e) => getComputedStyle(e).outlineStyle === "solid")) return [id, true];
  const look = () => getComputedStyle(active).boxShadow + getComputedStyle(active).borderColor;
  const before = look();
  active.blur();
  const after = look();
  active.focus();
  return [id, active.matches("textarea, [type=text]:not([role])") && before !== after];
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_hint_can_be_read(open_page, theme):
    visitor = open_page(query=f"?__theme={theme}")
    visitor.ask("你好")
    visitor.wait_for_end(1)
    faint = visitor.page.evaluate(FAINT, CONTRAST)
    assert faint == []


# Texts, and placeholders, of less contrast than is wanted with the first background behind them that is one.
FAINT = """(wanted) => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
  const channels = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const c = rgb[i] / 255;
    return sum + weight * (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  }, 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = channels(getComputedStyle(e).backgroundColor);
      if (color[3] > 250) return color;
    }
    return [255, 255, 255];
  };
  const faint = [];
  const check = (element, color, text) => {
    const [light, dark] = [luminance(channels(color)), luminance(behind(element))].sort((a, b) => b - a);
    let opacity = 1;
    for (let e = element; e; e = e.parentElement) opacity *= getComputedStyle(e).opacity;
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < wanted || opacity < 1) faint.push([text, contrast.toFixed(2), opacity]);
  };
  const places = "#history *, #temperature *, #max-length *, #folder *, #seed *, .facts *, #examples *";
  for (const e of document.querySelectorAll(places)) {
    const own = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join("");
    if (own && e.checkVisibility()) check(e, getComputedStyle(e).color, own);
  }
  for (const e of document.querySelectorAll("#question textarea, #seed input, #seed textarea")) {
    check(e, getComputedStyle(e, "::placeholder").color, e.placeholder);
  }
  return faint;
}"""


def color_of(visitor, where):
    return visitor.page.locator(where).first.evaluate("e => getComputedStyle(e).color")


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
        assert visitor.facts().startswith(f"由 {shown}")


def test_a_folder_is_added_and_answers(open_page, folders, alone):
    visitor = open_page()
    visitor.set_greedy()
    visitor.page.locator("#folder input, #folder textarea").fill(str(folders["prefix"]))
    visitor.page.locator("#add-button").click()
    visitor.has_text("#added", "已添加：my_prefix")
    assert color_of(visitor, "#added p") not in (WRONG, color_of(visitor, "body"))
    visitor.ask("你会做什么？")
    assert visitor.wait_for_end(1) == alone("prefix", "你会做什么？")
    assert visitor.facts().startswith("由 my_prefix")
    assert "my_prefix" in open_page().offered("left")


def test_a_folder_of_another_precision_is_added_with_a_note(open_page, folders, tmp_path):
    folder = shutil.copytree(folders["prefix"], tmp_path / "of_int4")
    identity = replace(load_base(str(EMBEDDED)).identity, quantization_bit=4)
    write_manifest(folder, Manifest("ptuning", identity, 5), [path.name for path in folder.iterdir()])
    visitor = open_page()
    visitor.page.locator("#folder input, #folder textarea").fill(str(folder))
    visitor.page.locator("#add-button").click()
    visitor.has_text("#added", "已添加：of_int4。 注意：它在 int4 的原模型上训练，而这里的原模型是全精度")


def test_a_wrong_folder_is_told_and_the_page_goes_on(visitor, alone, tmp_path):
    before = visitor.offered("left")
    wrong = {
        str(tmp_path / "nowhere"): "no such folder",
        str(tmp_path): "no LoRA",
        __file__: "a file, not a folder",
        "~nobodyxx/a": "~nobodyxx is nobody's folder",
        "a\0b": "no such folder",
        "/tmp/" + "a" * 5000: "a{20,}…a{20}: .*File name too long",
    }
    for folder, reason in wrong.items():
        visitor.page.locator("#folder input, #folder textarea").fill(folder)
        visitor.page.locator("#add-button").click()
        visitor.has_text("#added", reason)
        assert len(visitor.page.locator("#added").inner_text()) < 300
    assert visitor.page.locator(".toast-body").count() == 0
    assert color_of(visitor, "#added p") == WRONG
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
    assert visitor.facts("right").startswith(f"由 {ZH.base_alone}")
    visitor.page.locator("#side-by-side input").uncheck()
    wait_for(lambda: not visitor.page.locator("#right-chat").is_visible(), "one window")


def test_the_second_window_says_whose_answer_it_begins_with(visitor, served):
    served.served.delay = 0.05
    visitor.ask(QUESTION)
    wait_for(lambda: visitor.said() not in ([], ["…"]), "some text")
    visitor.page.locator("#side-by-side input").check()
    visitor.has_text("#notice", ZH.second_begins)
    wait_for(lambda: visitor.facts("right").startswith("由 lora 回答 · 生成中"), "whose answer it is")
    labels = [visitor.page.locator(f"#{side}-adapter").inner_text() for side in ("left", "right")]
    assert [text.strip() for text in labels] == [ZH.first, ZH.second]
    served.served.delay = 0.0
    visitor.wait_for_end(1, "right")


def test_an_answer_goes_on_in_the_language_that_is_switched_to(visitor, served):
    visitor.set_greedy()
    served.served.delay = 0.2
    visitor.ask(QUESTION)
    wait_for(lambda: "生成中" in visitor.facts(), "some text")
    visitor.page.get_by_label("English").check()
    visitor.has_text("#left-facts", f"by lora · {EN.writing}")
    tokens = visitor.facts()
    wait_for(lambda: visitor.facts() != tokens, "more text")
    assert EN.writing in visitor.facts()
    served.served.delay = 0.0
    visitor.wait_for_end(1)
    assert "tokens" in visitor.facts()


def test_a_server_that_ended_leaves_what_it_wrote(browser, folders):
    """Its own server, ended by closing the sockets in mid-answer."""
    served = start_engine()
    served.delay = 0.1
    with run_server(served) as (server, address):
        visitor = Visitor(browser, address)
        visitor.ask(QUESTION)
        wait_for(lambda: visitor.said() not in ([], ["…"]) and len(visitor.said()[0]) > 2, "some text")
        assert not visitor.page.locator("#lost").is_visible()
        server.should_exit = True
        wait_for(visitor.page.locator("#lost").is_visible, "the message")
    written = visitor.said()[0]
    assert written
    assert visitor.page.locator("#lost").inner_text().strip() == ZH.lost
    middle = visitor.page.locator("#left-chat [data-testid=bot]").last
    assert middle.evaluate(
        "e => { const b = e.getBoundingClientRect();"
        " return e.contains(document.elementFromPoint(b.x + b.width / 2, b.y + b.height / 2)); }"
    )
    assert not visitor.page.locator("#left-facts").is_visible()
    visitor.page.close()


def test_an_example_fills_the_question(visitor):
    visitor.page.locator("#examples").get_by_text(EXAMPLES["zh"][0]).click()
    wait_for(lambda: visitor.question.input_value() == EXAMPLES["zh"][0], "the example")
    visitor.page.get_by_label("English").check()
    visitor.page.locator("#examples").get_by_text(EXAMPLES["en"][1]).click()
    wait_for(lambda: visitor.question.input_value() == EXAMPLES["en"][1], "the English example")
    assert EXAMPLES["zh"][2] not in visitor.page.locator("#examples").inner_text()


def test_the_language_is_switched_for_one_visitor(open_page):
    first, second = open_page(), open_page()
    first.set_max_length(48)
    first.ask("你好")
    first.wait_for_end(1)
    first.page.get_by_label("English").check()
    first.has_text("#send", EN.send)
    first.question.focus()  # the mouse is still over the language
    chosen = first.page.locator("#language input:checked").evaluate("e => getComputedStyle(e).backgroundColor")
    assert chosen == first.page.locator("#history input").evaluate("e => getComputedStyle(e).backgroundColor")
    first.has_text("#left-facts", "tokens")
    for text in (EN.history, EN.side_by_side, EN.sampling, EN.greedy, EN.top_p, EN.add, EN.examples, EN.adapter):
        assert first.page.get_by_text(text, exact=True).first.is_visible(), text
    words = first.page.locator("body").inner_text()
    for text in (ZH.history, ZH.send, ZH.examples, ZH.folder, ZH.top_p_hint):
        assert text not in words
    first.ask("裤" * 60)
    first.has_text("#notice", "too long: 6[0-9] tokens.*raise the maximum length")
    assert (first.page.title(), first.page.locator("html").get_attribute("lang")) == (EN.title, "en")
    assert (second.page.title(), second.page.locator("html").get_attribute("lang")) == (ZH.title, "zh-Hans")
    second.has_text("#send", ZH.send)


def test_mistakes_are_told_and_the_page_goes_on(visitor):
    visitor.page.locator("#send").click()
    visitor.has_text("#notice", ZH.empty_question)
    visitor.ask("裤" * 200)
    visitor.has_text("#notice", "问题太长：共 20[0-9] 个 token.*80")
    assert visitor.question.input_value() == "裤" * 200
    assert color_of(visitor, "#notice p") == WRONG
    visitor.set_max_length(2048)
    visitor.ask("裤" * 2100)
    visitor.has_text("#notice", "2048。" + ZH.shorten + "$")
    visitor.set_max_length(80)
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
    others = []
    with served.engine.paused():
        with pytest.raises(QueueFullError):
            ask_until_refused(served.chat, others)
        second.ask("你会做什么？")
        second.has_text("#notice", ZH.full)
    wait_for(lambda: not any(other.is_writing for other in others), "room")
    second.page.locator("#send").click()
    assert second.wait_for_end(2) == alone("lora", "你会做什么？", [("你好", alone("lora", "你好"))])


def ask_until_refused(chat, others):
    while True:
        others.append(Visit())
        chat.ask(others[-1], "你好", Choices(adapters=("lora",), keeps_history=False, settings=GREEDY))


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
    visitor.page.evaluate("scrollTo(0, 0)")
    question = visitor.question.bounding_box()
    assert question["y"] + question["height"] <= PHONE["height"]
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
