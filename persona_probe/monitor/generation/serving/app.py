"""The endpoint itself: OpenAI's chat completions over HTTP, on this machine only."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from persona_probe.files import NotJson, decode_json
from persona_probe.monitor.generation.serving.engine import Engine, Event, Finished, Job, Piece
from persona_probe.monitor.generation.serving.requests import ApiError, Limits, read_request
from persona_probe.monitor.generation.trace import alarm_record, rounded
from persona_probe.writing import json_values

HOSTS = ("127.0.0.1", "localhost")
EXTENSION = "persona_probe"
"""Key of a completion, or of a chunk, that holds what was read."""
REASONS = {"stop": "stop", "length": "length", "alarm": "content_filter"}
GONE_S = 0.25
"""Seconds between two looks whether a client that waits for a whole answer is still there."""


def make_app(engine: Engine) -> FastAPI:
    """The endpoint of a running engine; its routes are /v1/chat/completions, /v1/models and /health."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _any_error)
    app.add_middleware(OnlyThisMachine)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = read_request(await _json_body(request, engine.limits), engine.name, engine.limits)
        id = f"chatcmpl-{secrets.token_hex(12)}"
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = await asyncio.to_thread(engine.submit, id, asked, emit)
        if asked.stream:
            first = await _first(events, request, job)
            return StreamingResponse(_chunks(engine, job, first, events), media_type="text/event-stream", headers=PLAIN)
        return JSONResponse(_completion(engine, job, await _whole(events, request, job)))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": engine.name, "object": "model", "owned_by": "persona_probe"}]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return engine.state

    return app


PLAIN = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class OnlyThisMachine:
    """Refuses other host names (DNS rebinding), and bodies that a web page could send without asking the browser."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] == "http" and (refused := _refusal(scope)) is not None:
            await _as_response(refused)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _refusal(scope: Scope) -> ApiError | None:
    headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
    if headers.get(b"host", "").rsplit(":", 1)[0] not in HOSTS:
        return ApiError(403, "this server answers under 127.0.0.1 and localhost only", "host_not_allowed")
    kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    if scope["method"] == "POST" and kind != "application/json":
        return ApiError(415, "send JSON with the header Content-Type: application/json", "not_json")
    return None


async def _json_body(request: Request, limits: Limits) -> object:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limits.body_bytes:
            raise ApiError(413, f"the body is larger than {limits.body_bytes} bytes: send a shorter one", "too_large")
    try:
        return decode_json(data.decode())
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})", "not_json") from error
    except NotJson as error:
        raise ApiError(400, f"the body is not JSON: {error}", "not_json") from error


# --- Errors, all in OpenAI's shape


def _as_response(error: ApiError) -> JSONResponse:
    again = {"Retry-After": "1"} if error.status == 503 else {}
    return JSONResponse(error.body(), error.status, headers={**again, **PLAIN})


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _as_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = "known are POST /v1/chat/completions, GET /v1/models and GET /health"
    return _as_response(ApiError(error.status_code, f"{request.method} of this path is not here: {known}", "not_found"))


async def _any_error(_: Request, error: Exception) -> Response:
    return _as_response(ApiError(500, f"the server failed ({type(error).__name__})", "failed"))


# --- A whole answer, or a stream of pieces


async def _next(events: asyncio.Queue[Event], request: Request, job: Job) -> Event:
    """The job's next event; a client that has gone meanwhile cancels the job."""
    while True:
        try:
            return await asyncio.wait_for(events.get(), GONE_S)
        except TimeoutError:
            if await request.is_disconnected():
                job.cancelled = True
                raise ApiError(499, "the client has gone", "gone") from None


async def _whole(events: asyncio.Queue[Event], request: Request, job: Job) -> Finished:
    while True:
        event = await _next(events, request, job)
        if isinstance(event, ApiError):
            raise event
        if isinstance(event, Finished):
            return event


async def _first(events: asyncio.Queue[Event], request: Request, job: Job) -> Event:
    """The first event of a stream: an error before it is an error of the whole request."""
    event = await _next(events, request, job)
    if isinstance(event, ApiError):
        raise event
    return event


async def _chunks(engine: Engine, job: Job, first: Event, events: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
    chunk = _chunk_maker(engine, job)
    done = False
    try:
        yield chunk({"role": "assistant", "content": ""})
        event = first
        while not isinstance(event, Finished):
            if isinstance(event, ApiError):
                done = True
                yield _line(event.body())
                return
            yield chunk(_delta(event), read=_read(engine, event) if job.request.trace else None)
            event = await events.get()
        done = True
        if delta := _delta(event.rest):
            yield chunk(delta)
        yield chunk({}, REASONS[event.answer.finish], read=_extension(job, event, whole=False))
        if job.request.include_usage:
            yield chunk(None, usage=_usage(event))
        yield b"data: [DONE]\n\n"
    finally:
        if not done:  # the client has gone
            job.cancelled = True


def _chunk_maker(engine: Engine, job: Job) -> Callable[..., bytes]:
    head = {"id": job.id, "object": "chat.completion.chunk", "created": int(time.time()), "model": engine.name}

    def chunk(delta: Any, finish: str | None = None, read: Any = None, usage: Any = None) -> bytes:
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
        extra = {} if read is None else {EXTENSION: read}
        return _line({**head, "choices": choices, **({"usage": usage} if usage else {}), **extra})

    return chunk


def _line(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=True)}\n\n".encode()


def _delta(piece: Piece) -> dict[str, str]:
    thought = {"reasoning_content": piece.thought} if piece.thought else {}
    return {**thought, **({"content": piece.answer} if piece.answer else {})}


def _read(engine: Engine, piece: Piece) -> dict[str, Any] | None:
    if not piece.values:
        return None
    values = dict(zip(engine.monitor.features.names, map(rounded, piece.values), strict=True))
    return {"token": piece.token, "values": values}


def _completion(engine: Engine, job: Job, event: Finished) -> dict[str, Any]:
    answer = event.answer
    thought = {"reasoning_content": answer.thought} if answer.thought else {}
    message = {"role": "assistant", "content": answer.text, **thought}
    choice = {"index": 0, "message": message, "finish_reason": REASONS[answer.finish], "logprobs": None}
    head = {"id": job.id, "object": "chat.completion", "created": int(time.time()), "model": engine.name}
    return {**head, "choices": [choice], "usage": _usage(event), EXTENSION: _extension(job, event, whole=True)}


def _usage(event: Finished) -> dict[str, int]:
    made = len(event.answer.trace.ids)
    return {
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": made,
        "total_tokens": event.prompt_tokens + made,
    }


def _extension(job: Job, event: Finished, whole: bool) -> dict[str, Any]:
    """What was read: the whole trace, or only what a stream has not sent yet."""
    answer = event.answer
    trace = answer.trace.record() if whole and job.request.trace else {}
    return json_values(
        {
            **trace,
            "adapter": event.deployed,
            "seed": job.request.config.seed,
            "thresholds": {name: rounded(value) for name, value in answer.trace.thresholds.items()},
            "alarms": [alarm_record(alarm) for alarm in answer.alarms],
            "notes": list(answer.notes),
            "attempts": job.attempt + 1,
            "steered_from": answer.steered_from,
            **({} if whole or answer.finish != "alarm" else {"text": answer.text}),
        }
    )
