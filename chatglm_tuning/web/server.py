"""The chat page behind an address: one process, until it is told to end."""

import logging
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from chatglm_tuning.web.look import ALIVE_PATH, make_head, make_script, make_theme
from chatglm_tuning.web.page import ChatPage

# An open page holds a connection that never ends by itself.
_SECONDS_TO_END = 1


def make_app(page: ChatPage) -> FastAPI:
    """Return the page as an application; nothing in it asks another host for anything."""
    app = FastAPI(openapi_url=None)
    word = secrets.token_hex(8)
    app.get(ALIVE_PATH)(lambda: PlainTextResponse(word))
    return gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=make_theme(),
        head=make_head(),
        js=make_script(),
    )


def serve(page: ChatPage, listener: socket.socket, announce: Callable[[], None]) -> None:
    """Serve until SIGTERM, after which this returns, or SIGINT, which raises KeyboardInterrupt.

    announce: called once the page can be opened.
    """
    config = uvicorn.Config(make_app(page), log_level="warning", timeout_graceful_shutdown=_SECONDS_TO_END)
    with _sigterm_ends_quietly():
        _AnnouncedServer(config, announce).run(sockets=[listener])


class _AnnouncedServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # It would report every page that is still open, as an error with a traceback.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


@contextmanager
def _sigterm_ends_quietly() -> Iterator[None]:
    """uvicorn raises the signals that it took once more when it is done: this one has done its work by then."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
