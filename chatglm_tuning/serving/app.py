"""The routes of `chatglm-tuning serve`."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from chatglm_tuning.serving.answers import Answers, Piece, begin_answers
from chatglm_tuning.serving.limits import (
    CHAT,
    COMPLETIONS,
    HEALTH,
    METRICS,
    MODELS,
    Gate,
    answer_timeout,
    error_response,
    read_object,
    request_timeout,
    unless_client_leaves,
)
from chatglm_tuning.serving.protocol import (
    ChatBody,
    CompletionBody,
    ProtocolError,
    read_chat,
    read_completion,
    shortened,
)
from chatglm_tuning.serving.service import Service

_LAST_WORDS_SECONDS = 1.0
_METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"

Read = Callable[[Mapping[str, Any]], ChatBody | CompletionBody]


def make_app(service: Service) -> FastAPI:
    """Return the ASGI application that answers for `service`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Gate, service=service)
    _add_error_answers(app)

    @app.api_route(HEALTH, methods=["GET", "HEAD"])
    async def health() -> JSONResponse:
        status = "draining" if service.is_draining else "ok"
        return JSONResponse({"status": status}, status_code=503 if service.is_draining else 200)

    @app.get(METRICS)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=_METRICS_TYPE)

    @app.get(MODELS)
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_describe(service, name) for name in service.adapters]})

    @app.get(f"{MODELS}/{{name:path}}")
    async def model(name: str) -> JSONResponse:
        service.adapter(name)
        return JSONResponse(_describe(service, name))

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        return await _answer(service, request, read_chat)

    @app.post(COMPLETIONS)
    async def complete(request: Request) -> Response:
        return await _answer(service, request, read_completion)

    return app


def _describe(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "chatglm-tuning"}


def _add_error_answers(app: FastAPI) -> None:
    async def refuse(_request: Request, error: Exception) -> Response:
        assert isinstance(error, ProtocolError)
        return error_response(error)

    async def refuse_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        allowed = (error.headers or {}).get("Allow", "")
        message, code = {
            404: ("There is no such route", "not_found"),
            405: (f"This route takes {allowed}, not {shortened(request.method)}", "method_not_allowed"),
        }.get(error.status_code, (error.detail, None))
        return error_response(ProtocolError(error.status_code, message, code=code, headers=error.headers))

    async def say_nothing(_request: Request, _error: Exception) -> Response:
        return PlainTextResponse("", status_code=400)  # nobody reads it

    async def admit_failure(_request: Request, _error: Exception) -> Response:
        return error_response(ProtocolError(500, "The server failed", code="internal_error", kind="server_error"))

    app.add_exception_handler(ProtocolError, refuse)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(ClientDisconnect, say_nothing)
    app.add_exception_handler(Exception, admit_failure)


async def _answer(service: Service, request: Request, read: Read) -> Response:
    """Answer a request of either kind, streamed or not; raises ProtocolError where it is not to be answered."""
    seconds, started = service.arguments.request_timeout, request.state.started
    is_read = False
    try:
        async with asyncio.timeout(seconds - (time.perf_counter() - started)):
            values = await read_object(request, service.arguments.max_body_bytes)
            is_read = True
            body = read(values)
            request.state.model = body.model if body.model in service.adapters else ""
            answers = await begin_answers(service, body, started)
            if body.stream:
                return await _begin_stream(service, request, answers, has_usage=body.includes_usage)
            try:
                return await unless_client_leaves(request, _collect(answers))
            finally:
                answers.close()
    except TimeoutError:
        raise (answer_timeout(seconds, has_begun=False) if is_read else request_timeout(seconds)) from None


async def _collect(answers: Answers) -> JSONResponse:
    texts, reasons = ["" for _ in answers.indices], ["" for _ in answers.indices]
    async for piece in answers.pieces():
        texts[piece.index] += piece.text
        reasons[piece.index] = piece.finish_reason or ""
    choices = [answers.envelope.choice(index, texts[index], reasons[index]) for index in answers.indices]
    return JSONResponse(answers.envelope.whole(choices, answers.usage))


async def _begin_stream(service: Service, request: Request, answers: Answers, *, has_usage: bool) -> "_EventStream":
    """Wait for the first piece: what fails before it still gets an answer with a status of its own."""
    pieces = answers.pieces()
    try:
        first = await unless_client_leaves(request, anext(pieces))
    except BaseException:
        answers.close()
        raise
    return _EventStream(answers, first, pieces, has_usage=has_usage, timeout=service.arguments.request_timeout)


class _EventStream(StreamingResponse):
    """A stream of server-sent events, which lets go of its answers however it ends."""

    media_type = "text/event-stream"

    def __init__(
        self, answers: Answers, first: Piece, others: AsyncIterator[Piece], *, has_usage: bool, timeout: float
    ) -> None:
        super().__init__(self._events(first, others), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answers = answers
        self._has_usage = has_usage
        self._timeout = timeout
        self._is_complete = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._timeout - (time.perf_counter() - scope["state"]["started"])):
                await super().__call__(scope, receive, send)
                scope["state"]["has_left"] = not self._is_complete
        except TimeoutError:
            await self._give_up(send)
        finally:
            self._answers.close()

    async def _give_up(self, send: Send) -> None:
        """End a stream that takes too long; one that nobody reads cannot be told so, and is cut."""
        event = _event(answer_timeout(self._timeout, has_begun=True).body())
        try:
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await send({"type": "http.response.body", "body": event.encode("utf-8"), "more_body": False})
        except TimeoutError:
            return

    async def _events(self, first: Piece, others: Any) -> AsyncIterator[str]:
        openings = [self._answers.envelope.opening(index) for index in self._answers.indices]
        for opening in openings:
            if opening is not None:
                yield self._chunk([opening])
        try:
            async with aclosing(others):
                yield self._piece(first)
                async for piece in others:
                    yield self._piece(piece)
        except ProtocolError as error:
            self._is_complete = True
            yield _event(error.body())
            return
        if self._has_usage:
            yield self._chunk([], self._answers.usage)
        self._is_complete = True
        yield "data: [DONE]\n\n"

    def _piece(self, piece: Piece) -> str:
        """Return a piece as one event, or two where it is the last: its reason comes in one of its own."""
        envelope = self._answers.envelope
        events = ""
        if piece.text:
            events = self._chunk([envelope.piece(piece.index, piece.text, None)])
        if piece.finish_reason is not None:
            events += self._chunk([envelope.piece(piece.index, "", piece.finish_reason)])
        return events

    def _chunk(self, choices: list[dict[str, Any]], usage: Mapping[str, Any] | None = None) -> str:
        return _event(self._answers.envelope.chunk(choices, usage, has_usage=self._has_usage))


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
