"""The running server: its address, and an end that lets those under way finish."""

import asyncio
import errno
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from chatglm_tuning.errors import UserError
from chatglm_tuning.serving.app import make_app
from chatglm_tuning.serving.service import Service

_POLL_SECONDS = 0.05
_BACKLOG = 2048
# For clients to take what was written to them, once nothing more is computed.
_LAST_ANSWERS_SECONDS = 2


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raises UserError where the address cannot be had.

    Clients that come before the model is loaded wait for it.
    """
    where = f"--host {host} --port {port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise UserError(
            f"there is no address of that name ({error.strerror})", where=where, remedy="Give a host of this machine"
        ) from error
    try:
        # Without it the port could not be used for a minute after another server's end.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        is_taken = error.errno == errno.EADDRINUSE
        raise UserError(
            "another program listens there already" if is_taken else f"it cannot be listened on ({error.strerror})",
            where=where,
            remedy="Give another --port, or end that program" if is_taken else "Give another --host or --port",
        ) from error
    return listener


class DrainingServer(uvicorn.Server):
    """Serves until a signal comes, then takes no more requests and ends once those under way have their answers."""

    def __init__(self, service: Service, announce: Callable[[], None]) -> None:
        """announce: called once the server answers."""
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
                backlog=_BACKLOG,
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
