"""The running server: what is no HTTP gets an answer too, and an end that lets those under way finish."""

import asyncio
import json
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from chatglm_tuning.serving.app import make_app
from chatglm_tuning.serving.protocol import ProtocolError
from chatglm_tuning.serving.service import Service

_POLL_SECONDS = 0.05
# For clients to take what was written to them, once nothing more is computed.
_LAST_ANSWERS_SECONDS = 2
_MOST_HEADER_BYTES = 16 * 1024
# RFC 9112, section 6.3: who believes the one and who believes the other sees different requests.
_LENGTHS = {b"content-length", b"transfer-encoding"}


class _Connection(h11.Connection):
    """h11's own, but for what it lets through: long headers that came in one piece, and two lengths of one body."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, _MOST_HEADER_BYTES)
        self.wants_head = False

    def next_event(self) -> Any:
        """Return the next event; raises h11.RemoteProtocolError, as for all that is no HTTP."""
        event = super().next_event()
        if isinstance(event, h11.Request | h11.EndOfMessage):
            size = sum(len(name) + len(value) + len(b": \r\n") for name, value in event.headers)
            if isinstance(event, h11.Request):
                self.wants_head = event.method == b"HEAD"
                size += len(event.method) + len(event.target) + len(b"  HTTP/1.1\r\n")
                if {name for name, _value in event.headers} >= _LENGTHS:
                    raise h11.RemoteProtocolError("two lengths of one body")
            if size > _MOST_HEADER_BYTES:
                raise h11.RemoteProtocolError("headers too long")
        return event

    def start_next_cycle(self) -> None:
        """Be ready for the next request."""
        super().start_next_cycle()
        self.wants_head = False


class _Protocol(H11Protocol):
    """uvicorn's own, but for what it takes for HTTP, and its answer to what is none, which no application sees."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: _Connection = _Connection()

    def send_400_response(self, msg: str) -> None:
        """Answer in the protocol's shape, unless an answer is under way already, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._send_400_response()
        self.transport.close()

    def _send_400_response(self) -> None:
        content = json.dumps(ProtocolError(400, "This is no valid HTTP request", code="invalid_http").body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
        answer = h11.Response(status_code=400, headers=list(headers.items()), reason=b"Bad Request")
        data = [] if self.conn.wants_head else [h11.Data(data=content)]
        events = (answer, *data, h11.EndOfMessage())
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))


class DrainingServer(uvicorn.Server):
    """Serves until a signal comes, then takes no more requests and ends once those under way have their answers."""

    def __init__(self, service: Service, announce: Callable[[], None]) -> None:
        """announce: called once the server answers."""
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
            )
        )
        self._service = service
        self._announce = announce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._is_hurried = False

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve on `sockets`, which listen already, until `begin_drain`; the engine is closed then."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; a second one cancels what is still under way."""
        self.begin_drain()

    def begin_drain(self) -> None:
        """Begin to drain, or hurry with it; from any thread and in a signal handler."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._drain_or_hurry)

    def _drain_or_hurry(self) -> None:
        if self._draining is not None:
            self._is_hurried = True
            return
        self._service.is_draining = True
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        await self._wait_for_answers(self._service.arguments.drain_seconds)
        await asyncio.to_thread(self._service.engine.close)
        self._is_hurried = False
        await self._wait_for_answers(_LAST_ANSWERS_SECONDS)
        self.should_exit = True

    async def _wait_for_answers(self, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while self._service.active and not self._is_hurried and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
