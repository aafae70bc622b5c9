"""OpenAI's API over HTTP. Knows no torch: what answers is a `zinit.serve.requests.Service`."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from zinit.errors import ZinitError
from zinit.serve.bodies import AdapterBody, Asking, ChatBody, CompletionBody
from zinit.serve.guard import Guard
from zinit.serve.metrics import Metrics
from zinit.serve.requests import Deliver, Event, Failed, Piece, Refused, Service, Ticket
from zinit.serve.shapes import ChatShape, CompletionShape, Shape

log = logging.getLogger("zinit.serve")
Ask = Callable[[Deliver], Ticket]
NO_KEY = "adapters are loaded and unloaded with a key only: --api-key-file."


def make_app(
    service: Service,
    *,
    keys: frozenset[str] = frozenset(),
    hosts: frozenset[str] = frozenset(),
    on_stop: Callable[[], None] = lambda: None,
    fixed: str = "",
) -> FastAPI:
    """The application.

    Args:
        service: what answers.
        keys: any of these is needed, if there are some; without one nothing can be loaded or unloaded.
        hosts: names that requests may be sent to; empty is any.
        on_stop: called when the server goes down.
        fixed: why no adapter can be loaded or unloaded; empty if a key is enough.
    """
    app = FastAPI(title="zinit", lifespan=_lifespan(on_stop), docs_url=None, redoc_url=None)
    metrics = Metrics(service)
    app.add_middleware(Guard, keys=keys, hosts=hosts, most=service.limits.body_bytes)
    _add_errors(app)
    _add_models(app, service, metrics)
    _add_admin(app, service, refusal=fixed or ("" if keys else NO_KEY))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        turns, sampling = await run_in_threadpool(body.turns), body.to_sampling(service.limits.new_tokens)
        shape = ChatShape(model=body.model, with_logprobs=bool(body.logprobs))
        return await answer(body, request, shape, lambda deliver: service.chat(body.model, turns, sampling, deliver))

    @app.post("/v1/completions", response_model=None)
    async def complete(body: CompletionBody, request: Request) -> Response:
        prompts, sampling = body.prompts(), body.to_sampling(service.limits.new_tokens)
        shape = CompletionShape(model=body.model, with_logprobs=body.logprobs is not None)
        return await answer(
            body, request, shape, lambda deliver: service.complete(body.model, prompts, sampling, deliver)
        )

    async def answer(body: Asking, request: Request, shape: Shape, ask: Ask) -> Response:
        started = time.perf_counter()
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = await run_in_threadpool(ask, deliver)
        watched = metrics.watch(body.model, ticket, _events(events, ticket), started)
        if body.stream:
            wants_usage = body.stream_options is not None and body.stream_options.include_usage
            lines = _stream(shape, watched, ticket, wants_usage)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await _whole(shape, watched, ticket, request)

    return app


def _lifespan(on_stop: Callable[[], None]) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(on_stop)

    return lifespan


async def _events(queue: asyncio.Queue[Event], ticket: Ticket) -> AsyncIterator[Event]:
    """The events of a request up to its end; the request is cancelled if nobody waits for it."""
    open_answers = ticket.choices
    try:
        while open_answers:
            event = await queue.get()
            yield event
            if isinstance(event, Failed):
                return
            open_answers -= event.reason is not None
    finally:
        ticket.cancel()


async def _whole(shape: Shape, events: AsyncIterator[Event], ticket: Ticket, request: Request) -> Response:
    """All answers as one document."""

    async def collect() -> Response:
        pieces: list[Piece] = []
        async for event in events:
            if isinstance(event, Failed):
                return _error(event.message, event.status)
            pieces.append(event)
        return JSONResponse(shape.document(pieces, ticket.prompt_tokens))

    collecting = asyncio.ensure_future(collect())
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)
        return collecting.result()
    finally:
        for task in (collecting, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(shape: Shape, events: AsyncIterator[Event], ticket: Ticket, wants_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: one for each piece, the counts where they are wanted, and the end."""
    generated = 0
    try:
        for chunk in shape.opening(ticket.choices):
            yield _line(chunk)
        async for event in events:
            if isinstance(event, Failed):
                yield _line(_error_document(event.message, event.status))
                return
            generated += len(event.tokens)
            yield _line(shape.chunk(event))
        if wants_usage:
            yield _line(shape.usage_chunk(ticket.prompt_tokens, generated))
        yield "data: [DONE]\n\n"
    finally:
        ticket.cancel()


def _line(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document)}\n\n"


def _add_models(app: FastAPI, service: Service, metrics: Metrics) -> None:
    def describe(info: Any) -> dict[str, Any]:
        return {"id": info.id, "object": "model", "created": info.created, "owned_by": "zinit", "sees": info.sees}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(info) for info in service.models()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        for info in service.models():
            if info.id == name:
                return describe(info)
        raise Refused(f"there is no model {name[:100]!r}.", status=404, code="model_not_found", parameter="model")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_model=None)
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)


def _add_admin(app: FastAPI, service: Service, *, refusal: str) -> None:
    def check() -> None:
        if refusal:
            raise Refused(refusal, status=403)

    @app.post("/admin/adapters", response_model=None, status_code=201)
    async def load(body: AdapterBody) -> Response:
        check()
        try:
            await run_in_threadpool(service.load, body.id, body.source)
        except Refused:
            raise
        except ZinitError as error:  # names files of this machine
            log.warning("the adapter %r was not loaded: %s", body.id, error)
            raise Refused("the adapter cannot be loaded; the server's log says why.") from error
        return JSONResponse({"id": body.id, "loaded": True}, status_code=201)

    @app.delete("/admin/adapters/{name}", response_model=None)
    async def unload(name: str) -> Response:
        check()
        await run_in_threadpool(service.unload, name)
        return JSONResponse({"id": name, "loaded": False})


# --- errors -----------------------------------------------------------------------------------------------------------


def _error_document(message: str, status: int, code: str | None = None, parameter: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def _error(message: str, status: int, code: str | None = None, parameter: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(_error_document(message, status, code, parameter), status_code=status, headers=headers)


def _add_errors(app: FastAPI) -> None:
    """Every error is one JSON document in OpenAI's form."""

    async def refused(_: Request, error: Any) -> Response:
        return _error(str(error), error.status, error.code, error.parameter)

    async def invalid(_: Request, error: Any) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part)[:60] for part in first["loc"] if part != "body")[:200]
        return _error(f"{where or 'the body'}: {first['msg'][:300]}.", 400, "invalid_body", where or None)

    async def http(_: Request, error: Any) -> Response:
        return _error(str(error.detail), error.status_code)

    async def fault(_: Request, error: Any) -> Response:
        return _error("the server has a fault; its log says more.", 500)

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, fault)
