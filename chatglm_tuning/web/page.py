"""The chat page in Gradio: components, their texts in the chosen language, and what a click does."""

import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any, Literal, TypeVar

import gradio as gr
from gradio.blocks import Block

from chatglm_tuning.config.arguments import SEED_VALUE, ChatArguments
from chatglm_tuning.config.web import BASE_NAME, Language
from chatglm_tuning.errors import UserError
from chatglm_tuning.inference.engine import EngineClosedError, QueueFullError
from chatglm_tuning.inference.stream import GenerationSettings
from chatglm_tuning.web.conversation import Chat, Choices, Exchange, QuestionLengthError, Visit, watch
from chatglm_tuning.web.look import make_title_script
from chatglm_tuning.web.shelf import read_folder
from chatglm_tuning.web.texts import EXAMPLES, LANGUAGE_CODES, LANGUAGES, TEXTS, Texts

Made = TypeVar("Made", bound=Block)
Updates = dict[Block, Any]
# How a message looks: a mistake, something that was done, or neither.
Kind = Literal["wrong", "done", "note"]

_MAX_TEMPERATURE = 2.0
_SHORTEST = 16
_NO_TEXT = "…"


@dataclass(frozen=True)
class Beginning:
    """What the page begins with. context: the most tokens that the model reads and writes together."""

    language: Language
    max_length: int
    seed: int | None
    context: int


class ChatPage:
    """The page of one program; every visitor has a `Visit` of their own."""

    def __init__(self, chat: Chat, beginning: Beginning) -> None:
        self._chat = chat
        self._beginning = beginning
        self._texts_of: dict[Block, dict[str, str]] = {}
        with gr.Blocks(title=TEXTS[beginning.language].title, analytics_enabled=False) as self.blocks:
            self._visit = gr.State(Visit(beginning.language), delete_callback=Visit.stop)
            self._make(gr.Markdown, {"value": "lost"}, elem_id="lost")
            self._add_heading()
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    self._add_windows()
                    self._add_question()
                with gr.Column(scale=1, min_width=280):
                    self._add_settings()
            self._connect()
        self.blocks.queue(api_open=False, default_concurrency_limit=None)

    def _make(self, kind: Callable[..., Made], texts: dict[str, str], **options: Any) -> Made:
        """Make a component. texts: from its properties to the fields of `Texts` that they show."""
        shown = {name: getattr(TEXTS[self._beginning.language], key) for name, key in texts.items()}
        component = kind(**shown, **options)
        self._texts_of[component] = texts
        return component

    def _add_heading(self) -> None:
        with gr.Row(equal_height=True):
            gr.Markdown("# ChatGLM-6B", elem_id="heading")
            self._language = gr.Radio(
                [(name, code) for code, name in LANGUAGES.items()],
                value=self._beginning.language,
                label=TEXTS[self._beginning.language].language,
                show_label=False,
                container=False,
                elem_id="language",
                min_width=180,
            )

    def _add_windows(self) -> None:
        names = self._chat.shelf.names
        with gr.Row():
            left = self._add_window("left", names[min(1, len(names) - 1)], is_visible=True)
            right = self._add_window("right", BASE_NAME, is_visible=False)
        self._columns, self._adapters = (left[0], right[0]), (left[1], right[1])
        self._windows, self._facts = (left[2], right[2]), (left[3], right[3])

    def _add_window(
        self, side: str, adapter: str, *, is_visible: bool
    ) -> tuple[gr.Column, gr.Dropdown, gr.Chatbot, gr.Markdown]:
        with gr.Column(min_width=300, visible=is_visible, elem_id=f"{side}-column") as column:
            picker = self._make(
                gr.Dropdown,
                {"label": "adapter" if side == "left" else "second"},
                choices=self._adapter_choices(self._beginning.language),
                value=adapter,
                elem_id=f"{side}-adapter",
            )
            window = self._make(
                gr.Chatbot,
                {"placeholder": "placeholder"},
                show_label=False,
                render_markdown=False,
                latex_delimiters=[],
                buttons=[],
                elem_id=f"{side}-chat",
            )
            facts = gr.Markdown("", elem_classes="facts", elem_id=f"{side}-facts")
        return column, picker, window, facts

    def _add_question(self) -> None:
        self._notice = gr.Markdown("", elem_id="notice")
        self._question = self._make(
            gr.Textbox,
            {"label": "question", "placeholder": "question_hint"},
            lines=1,  # with more, Gradio makes Enter a new line
            max_lines=8,
            elem_id="question",
            autofocus=True,
        )
        with gr.Row():
            self._send = self._make(gr.Button, {"value": "send"}, variant="primary", min_width=80, elem_id="send")
            self._stop = self._make(
                gr.Button, {"value": "stop"}, variant="stop", visible=False, min_width=80, elem_id="stop"
            )
            self._again = self._make(gr.Button, {"value": "regenerate"}, min_width=80, elem_id="again")
            self._clear = self._make(gr.Button, {"value": "clear"}, min_width=80, elem_id="clear")
        self._examples = self._make(
            gr.Dataset,
            {"label": "examples"},
            components=[self._question],
            samples=_samples(self._beginning.language),
            elem_id="examples",
        )

    def _add_settings(self) -> None:
        self._side_by_side = self._make(gr.Checkbox, {"label": "side_by_side"}, elem_id="side-by-side")
        self._history = self._make(
            gr.Checkbox, {"label": "history", "info": "history_hint"}, value=True, elem_id="history"
        )
        with self._make(gr.Accordion, {"label": "sampling"}, elem_id="sampling"):
            self._add_sampling()
        with self._make(gr.Accordion, {"label": "add"}, elem_id="add"):
            self._folder = self._make(
                gr.Textbox, {"label": "folder", "info": "folder_hint"}, max_lines=1, elem_id="folder"
            )
            self._add = self._make(gr.Button, {"value": "add_button"}, size="sm", elem_id="add-button")
            self._added = gr.Markdown("", elem_id="added")

    def _add_sampling(self) -> None:
        beginning = self._beginning
        self._greedy = self._make(gr.Checkbox, {"label": "greedy"}, elem_id="greedy")
        self._temperature = self._make(
            gr.Slider,
            {"label": "temperature", "info": "temperature_hint"},
            minimum=0.05,
            maximum=_MAX_TEMPERATURE,
            step=0.05,
            value=ChatArguments.temperature,
            elem_id="temperature",
        )
        self._top_p = self._make(
            gr.Slider,
            {"label": "top_p", "info": "top_p_hint"},
            minimum=0.05,
            maximum=1.0,
            step=0.05,
            value=ChatArguments.top_p,
            elem_id="top-p",
        )
        self._max_length = self._make(
            gr.Slider,
            {"label": "max_length", "info": "max_length_hint"},
            minimum=min(_SHORTEST, beginning.max_length),
            maximum=beginning.context,
            step=1,
            value=beginning.max_length,
            elem_id="max-length",
        )
        self._seed = self._make(
            gr.Textbox,
            {"label": "seed", "placeholder": "seed_hint"},
            value="" if beginning.seed is None else str(beginning.seed),
            max_lines=1,
            elem_id="seed",
        )

    def _connect(self) -> None:
        choices = [
            self._visit,
            *self._adapters,
            self._side_by_side,
            self._history,
            self._greedy,
            self._temperature,
            self._top_p,
            self._max_length,
            self._seed,
        ]
        shown: list[Any] = [
            *self._windows,
            *self._facts,
            self._notice,
            self._question,
            self._send,
            self._stop,
            self._again,
        ]
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        asking = [self._send.click, self._question.submit]
        # Without "multiple" Gradio drops what is asked while an answer is written, and says nothing.
        gr.on(asking, self._ask, [*choices, self._question], shown, trigger_mode="multiple", **quick)
        self._again.click(self._ask_again, choices, shown, **quick)
        self._stop.click(lambda visit: visit.stop(), self._visit, None, queue=False, **quick)
        clearing = [self._clear.click, *(window.clear for window in self._windows)]
        gr.on(clearing, self._forget, [self._visit], shown, **quick)
        self._side_by_side.change(
            self._show_second,
            [self._visit, self._side_by_side],
            [*shown, *self._columns, *self._adapters],
            **quick,
        )
        self._language.change(
            self._translate,
            [self._visit, self._language, self._side_by_side],
            [*self._texts_of, *self._facts, self._notice, self._added],
            **quick,
        )
        set_title = make_title_script({language: texts.title for language, texts in TEXTS.items()}, LANGUAGE_CODES)
        gr.on([self._language.change, self.blocks.load], None, self._language, None, js=set_title)
        adding = ([self._visit, self._folder], [*self._adapters, self._added])
        gr.on([self._add.click, self._folder.submit], self._add_folder, *adding, **quick)
        self._examples.click(lambda sample: sample[0], self._examples, self._question, **quick)
        self.blocks.load(self._refresh_adapters, self._visit, list(self._adapters), **quick)

    async def _ask(self, *values: Any) -> AsyncIterator[Updates]:
        *chosen, question = values
        visit, choices = self._read(chosen)
        if choices is None or not question.strip():
            texts = TEXTS[visit.language]
            yield {self._notice: _say(texts.bad_seed if choices is None else texts.empty_question, "wrong")}
            return
        start = partial(self._chat.ask, visit, question, choices)
        async with aclosing(self._write(visit, start, {self._question: "", self._notice: _say_nothing()})) as updates:
            async for update in updates:
                yield update

    async def _ask_again(self, *chosen: Any) -> AsyncIterator[Updates]:
        visit, choices = self._read(chosen)
        if choices is None or not visit.windows[0]:
            texts = TEXTS[visit.language]
            yield {self._notice: _say(texts.bad_seed if choices is None else texts.nothing_to_regenerate, "wrong")}
            return
        told = _say_nothing() if choices.settings.do_sample else _say(TEXTS[visit.language].same_again, "note")
        start = partial(self._chat.answer_again, visit, choices)
        async with aclosing(self._write(visit, start, {self._notice: told})) as updates:
            async for update in updates:
                yield update

    def _read(self, chosen: Sequence[Any]) -> tuple[Visit, Choices | None]:
        """Return who asks and what was chosen; None where the seed is none."""
        visit, left, right, is_side_by_side, keeps_history, greedy, temperature, top_p, length, seed = chosen
        try:
            seed = SEED_VALUE.convert(seed, name="seed") if seed.strip() else None
        except UserError:
            return visit, None
        settings = GenerationSettings(
            max_length=int(length), do_sample=not greedy, temperature=temperature, top_p=top_p, seed=seed
        )
        adapters = (left, right) if is_side_by_side else (left,)
        return visit, Choices(adapters=adapters, keeps_history=keeps_history, settings=settings)

    async def _write(self, visit: Visit, start: Callable[[], None], first: Updates) -> AsyncGenerator[Updates]:
        """Start answers and show them as they grow; first: what changes once they have begun."""
        if visit.is_writing:
            visit.is_told_to_wait = True
            yield {self._notice: _say(TEXTS[visit.language].busy, "note")}
            return
        try:
            start()
        except (QuestionLengthError, QueueFullError, EngineClosedError) as error:
            yield {self._notice: _say(self._explain(error, visit), "wrong")}
            return
        yield self._show(visit) | self._buttons(visit) | first
        async with aclosing(watch(visit)) as looks:
            async for _ in looks:
                yield self._show(visit)
        failures = [self._explain(answer.error, visit) for answer in visit.last_answers if answer.error is not None]
        told = {self._notice: _say(failures[0], "wrong")} if failures else {}
        if visit.is_told_to_wait and not failures:
            told = {self._notice: _say_nothing()}
        visit.is_told_to_wait = False
        yield self._show(visit) | self._buttons(visit) | told

    def _show(self, visit: Visit) -> Updates:
        """What stands in the windows and below them, in the language that was chosen last."""
        return dict(zip(self._windows, map(_messages, visit.windows), strict=True)) | self._show_facts(visit)

    def _show_facts(self, visit: Visit) -> Updates:
        texts = TEXTS[visit.language]
        return dict(zip(self._facts, (_describe_last(window, texts) for window in visit.windows), strict=True))

    def _buttons(self, visit: Visit) -> Updates:
        is_writing = visit.is_writing
        return {
            self._send: gr.update(visible=not is_writing),
            self._stop: gr.update(visible=is_writing),
            self._again: gr.update(interactive=not is_writing),
        }

    def _forget(self, visit: Visit) -> Updates:
        visit.clear()
        return self._show(visit) | self._buttons(visit) | {self._notice: _say_nothing()}

    def _show_second(self, visit: Visit, is_shown: bool) -> Updates:
        visit.show_right(is_shown)
        texts = TEXTS[visit.language]
        return {
            **self._show(visit),
            self._notice: _say(texts.second_begins, "note") if visit.windows[1] else _say_nothing(),
            self._columns[1]: gr.update(visible=is_shown),
            self._adapters[0]: gr.update(label=_first_label(texts, is_shown)),
        }

    def _translate(self, visit: Visit, language: Language, is_side_by_side: bool) -> Updates:
        visit.language = language
        texts = TEXTS[language]
        updates: Updates = {
            component: gr.update(**{name: getattr(texts, key) for name, key in shown.items()})
            for component, shown in self._texts_of.items()
        }
        choices = self._adapter_choices(language)
        updates[self._adapters[0]] = gr.update(label=_first_label(texts, is_side_by_side), choices=choices)
        updates[self._adapters[1]] = gr.update(label=texts.second, choices=choices)
        updates[self._examples] = gr.update(label=texts.examples, samples=_samples(language))
        return updates | self._show_facts(visit) | {self._notice: _say_nothing(), self._added: _say_nothing()}

    def _add_folder(self, visit: Visit, folder: str) -> Updates:
        texts = TEXTS[visit.language]
        if not folder.strip():
            return {self._added: _say(texts.no_folder, "wrong")}
        try:
            name = self._chat.shelf.add(read_folder(folder))
        except (UserError, OSError) as error:
            return {self._added: _say(texts.not_added.format(error=_plain(str(error))), "wrong")}
        choices = self._adapter_choices(visit.language)
        shelf = self._chat.shelf
        added, note = texts.added.format(name=_plain(name)), texts.unlike(shelf.unlike(name), shelf.bits)
        return {
            self._added: _say(f"{added} {note}", "note") if note else _say(added, "done"),
            self._adapters[0]: gr.update(choices=choices, value=name),
            self._adapters[1]: gr.update(choices=choices),
        }

    def _refresh_adapters(self, visit: Visit) -> Updates:
        choices = self._adapter_choices(visit.language)
        return {picker: gr.update(choices=choices) for picker in self._adapters}

    def _explain(self, error: Exception, visit: Visit) -> str:
        texts = TEXTS[visit.language]
        if isinstance(error, QuestionLengthError):
            advice = texts.shorten_or_raise if error.limit < self._beginning.context else texts.shorten
            return texts.too_long.format(tokens=error.tokens, limit=error.limit) + advice
        if isinstance(error, QueueFullError):
            return texts.full
        if isinstance(error, EngineClosedError):
            return texts.closing
        return texts.failed.format(error=_plain(str(error) or type(error).__name__))

    def _adapter_choices(self, language: Language) -> list[tuple[str, str]]:
        return [(_adapter_label(name, TEXTS[language]), name) for name in self._chat.shelf.names]


def _say(text: str, kind: Kind) -> Any:
    """Return what a line that tells something changes to."""
    return gr.update(value=text, elem_classes=[kind])


def _say_nothing() -> Any:
    # A new one each time: Gradio takes updates apart.
    return _say("", "note")


def _samples(language: Language) -> list[list[str]]:
    return [[text] for text in EXAMPLES[language]]


def _first_label(texts: Texts, is_side_by_side: bool) -> str:
    return texts.first if is_side_by_side else texts.adapter


def _adapter_label(name: str, texts: Texts) -> str:
    return texts.base_alone if name == BASE_NAME else name


def _messages(exchanges: Sequence[Exchange]) -> list[dict[str, Any]]:
    said = [
        pair
        for exchange in exchanges
        for pair in (("user", exchange.question), ("assistant", exchange.answer.text or _NO_TEXT))
    ]
    return [{"role": role, "content": _exactly(text)} for role, text in said]


def _exactly(text: str) -> dict[str, str]:
    """Return what the window shows as `text`: a plain string would lose its indentation, and what looks like a tag."""
    return {"type": "text", "text": escape(text, quote=False)}


def _describe_last(exchanges: Sequence[Exchange], texts: Texts) -> str:
    """Return one line on the last answer: whose it is, how it ended and how fast it came."""
    if not exchanges:
        return ""
    answer = exchanges[-1].answer
    if answer.reason is None and not answer.tokens:
        return texts.waiting
    ending = texts.writing if answer.reason is None else texts.ending(answer.reason)
    adapter = _plain(_adapter_label(answer.adapter, texts))
    line = texts.ended.format(adapter=adapter, ending=ending, tokens=answer.tokens)
    if (rate := answer.tokens_per_second) is not None:
        line += texts.rate.format(rate=rate)
    if answer.dropped_rounds:
        line += texts.dropped.format(rounds=answer.dropped_rounds)
    return line


def _plain(text: str) -> str:
    """Return text in which Markdown sees no signs of its own."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~$&])", r"\\\1", text)
