"""The chat page in a real browser: where it is found, and what a test says to the page."""

import os
import re
import shutil
import time
from collections.abc import Callable

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


def find_browser() -> str:
    """The system's Chromium; without one the test is skipped, and fails where CI is set."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        message = f"no browser for the tests of the chat page: install one of {', '.join(NAMES)}"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(message)
        pytest.skip(message)
    return found


def wait_for(condition: Callable[[], object], what: str, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


class Visitor:
    """Somebody with the page open. complaints: what the browser's console and the page's scripts complained of."""

    def __init__(self, context, address: str, viewport=DESKTOP, query="") -> None:
        self.page = context.new_page()
        self.page.set_viewport_size(viewport)
        self.complaints: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("console", lambda message: self._note(message) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._ask(request.url))
        self.page.goto(address + query)
        self.page.locator("#send").wait_for()
        self.question = self.page.locator("#question textarea")

    def _note(self, message) -> None:
        self.complaints.append(message.text)

    def _ask(self, url: str) -> None:
        if match := re.match(r"(?:https?|wss?)://([^/:]+)", url):
            self.hosts.add(match[1])

    def said(self, who: str = "bot", side: str = "left") -> list[str]:
        return [text.strip() for text in self.page.locator(f"#{side}-chat [data-testid={who}]").all_inner_texts()]

    def facts(self, side: str = "left") -> str:
        return self.page.locator(f"#{side}-facts").inner_text().strip()

    def ask(self, question: str) -> None:
        self.question.fill(question)
        self.page.locator("#send").click()

    def wait_for_end(self, rounds: int, side: str = "left") -> str:
        """Wait until the last of so many answers has ended, and return it."""
        ended = re.compile("回答完毕|达到最大长度|已停止|finished|maximum length|stopped")
        wait_for(
            lambda: len(self.said(side=side)) == rounds and ended.search(self.facts(side)) and self.is_idle(),
            f"{rounds} answers in the {side} window; it has {self.said(side=side)}, {self.facts(side)}",
        )
        return self.said(side=side)[-1]

    def is_idle(self) -> bool:
        return self.page.locator("#send").is_visible()

    def choose(self, side: str, name: str) -> None:
        self.page.locator(f"#{side}-adapter input").click()
        self.page.get_by_role("option", name=name, exact=True).click()

    def offered(self, side: str) -> list[str]:
        self.page.locator(f"#{side}-adapter input").click()
        names = [text.strip().removeprefix("✓").strip() for text in self.page.get_by_role("option").all_inner_texts()]
        self.page.keyboard.press("Escape")
        return names

    def set_greedy(self) -> None:
        self.page.locator("#greedy input").check()

    def set_max_length(self, tokens: int) -> None:
        field = self.page.locator("#max-length input[type=number]")
        field.fill(str(tokens))
        field.press("Tab")

    def has_text(self, where: str, pattern: str) -> None:
        """Wait until the element shows a text like `pattern`."""
        wait_for(
            lambda: re.search(
                pattern, self.page.locator(where).inner_text() if self.page.locator(where).count() else ""
            ),
            f"{pattern!r} in {where}",
        )
