"""What stands in front of every route: the key, the size of a body, time, and the count of what was answered."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Mapping
from email.message import Message as HeaderMessage
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatglm_tuning.serving.protocol import ProtocolError, shortened, shutting_down
from chatglm_tuning.serving.service import Service

logger = logging.getLogger(__name__)

HEALTH, METRICS, MODELS = "/health", "/metrics", "/v1/models"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_ROUTES = (HEALTH, METRICS, MODELS, CHAT, COMPLETIONS)
_CLIENT_LEFT = 499
_CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii")
_MOST_DIGITS = 1000


def error_response(error: ProtocolError) -> JSONResponse:
    """Return the answer that `error` is."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class Gate:
    """ASGI middleware around all routes; the state of the server stays readable while it drains."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), _CLIENT_LEFT
        state = scope.setdefault("state", {})
        state["started"] = started

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = uuid.uuid4().hex
            await send(message)

        self._service.active += 1
        try:
            if (refusal := self._refusal(scope)) is not None:
                await error_response(refusal)(scope, receive, send_and_note)
            else:
                await self._app(scope, receive, send_and_note)
        except Exception:
            status = 500  # which the middleware around this one answers
            raise
        finally:
            self._service.active -= 1
            route, seconds = _route(scope["path"]), time.perf_counter() - started
            status = _CLIENT_LEFT if state.get("has_left") else status
            model = state.get("model", "")
            self._service.metrics.count_request(route, status, model, seconds)
            level = logging.DEBUG if route in (HEALTH, METRICS) else logging.INFO  # those come every few seconds
            logger.log(level, "%s %d%s %.3f s", route, status, f" {model}" if model else "", seconds)

    def _refusal(self, scope: Scope) -> ProtocolError | None:
        path = scope["path"]
        if path == HEALTH:
            return None
        key = self._service.arguments.api_key
        if key is not None and not _has_key(Headers(scope=scope), key):
            return ProtocolError(
                401,
                "This server wants its API key, as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._service.is_draining and path != METRICS:
            return shutting_down()
        return None


def _has_key(headers: Headers, key: str) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    is_equal = hmac.compare_digest(given.strip().encode("latin-1", errors="replace"), key.encode("ascii"))
    return is_equal and scheme.lower() == "bearer"


def _route(path: str) -> str:
    if path in _ROUTES:
        return path
    return f"{MODELS}/{{model}}" if path.startswith(f"{MODELS}/") else "other"


async def read_object(request: Request, max_bytes: int) -> Mapping[str, Any]:
    """Return the JSON object that a request carries; raises ProtocolError where it carries none or too much.

    A page in a browser can send text/plain to any address without asking; application/json it cannot.
    """
    _check_kind(request.headers)
    body = await _read_body(request, max_bytes)
    try:
        values = json.loads(
            body.decode("utf-8").removeprefix("\ufeff"),
            object_pairs_hook=_object_of,
            parse_int=_read_integer,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError:
        raise _malformed("it is not UTF-8") from None
    except RecursionError:
        raise _malformed("it is nested too deeply") from None
    except ValueError as error:
        raise _malformed(str(error)) from None
    if not isinstance(values, dict):
        raise _malformed("it is no JSON object")
    return values


def _check_kind(headers: Headers) -> None:
    """Raise ProtocolError unless a body is said to be JSON, in UTF-8 and as it stands."""
    kind = HeaderMessage()
    kind["Content-Type"] = headers.get("content-type", "")
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if kind.get_content_type() != "application/json":
        raise ProtocolError(415, "The Content-Type must be application/json", code="unsupported_content_type")
    if (charset := _charset(kind)) not in _CHARSETS:
        raise ProtocolError(
            415, f"The body must be UTF-8, and its charset is {shortened(charset)!r}", code="unsupported_charset"
        )
    if encoding != "identity":
        raise ProtocolError(
            415,
            f"The body must be sent as it is, and its Content-Encoding is {shortened(encoding)!r}",
            code="unsupported_content_encoding",
        )


def _charset(kind: HeaderMessage) -> str:
    """Return the charset that is said, whatever it is; `get_content_charset` passes over one that is not ASCII."""
    given = kind.get_param("charset", "utf-8")
    return str(given[2] if isinstance(given, tuple) else given).lower()


async def _read_body(request: Request, max_bytes: int) -> bytes:
    # The connection stays open: closed with unread bytes, it would be reset before the client reads this answer.
    too_large = ProtocolError(413, f"The request is larger than {max_bytes} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    async for block in request.stream():
        body += block
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _read_integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{shortened(name)!r} stands in it twice")
        values[name] = value
    return values


def _malformed(why: str) -> ProtocolError:
    return ProtocolError(400, f"The body of the request cannot be read: {why}", code="invalid_json")


async def client_left(request: Request) -> None:
    """Return once the client of a request, whose body was read, has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def request_timeout(seconds: float) -> ProtocolError:
    """Return the answer to a request that took too long in coming."""
    return ProtocolError(
        408, f"The request did not come within {seconds:g} s", code="timeout", headers={"Connection": "close"}
    )


def answer_timeout(seconds: float, *, has_begun: bool) -> ProtocolError:
    """Return what is said where an answer takes too long, of which the client has a part already or none."""
    return ProtocolError(
        503,
        f"The answer did not end within {seconds:g} s" if has_begun else f"No answer was ready within {seconds:g} s",
        code="timeout",
        kind="server_error",
        # What took too long once would take the same time again.
        headers={"x-should-retry": "false"},
    )


async def unless_client_leaves(request: Request, work: Any) -> Any:
    """Return what the coroutine `work` gives; it is cancelled, and ClientDisconnect raised, once the client leaves."""
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(client_left(request))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            request.state.has_left = True
            raise ClientDisconnect
        return doing.result()
    finally:
        leaving.cancel()
        doing.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)
