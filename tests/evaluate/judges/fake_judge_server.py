"""A chat-completions server on this machine that knows a few prompts, counts its calls, and fails on demand."""

import asyncio
import json
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

Tokens = dict[str, float]


class FakeServer:
    """Answers the prompts in `known`, and any other with 400, so that a changed judge prompt fails a test."""

    def __init__(self, key: str = "") -> None:
        self.known: dict[str, Tokens | str] = {}
        """Whole prompts and the first token's probabilities, or the text of a written reply."""
        self.faults: deque[str] = deque()
        """Faults of the next calls, in order; then all is well."""
        self.always = ""
        """A fault of every call."""
        self.delay = 0.0
        self.held_from: int | None = None
        """Calls after this many wait until it is None again."""
        self.key = key
        self.calls: list[dict[str, Any]] = []
        """Every request's body, faulty ones too."""
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        app = FastAPI()
        app.post("/v1/chat/completions")(self.complete)
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> "FakeServer":
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/v1"

    def prompts(self) -> list[str]:
        return [call["messages"][0]["content"] for call in self.calls]

    async def complete(self, request: Request) -> Response:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            body = await request.json()
            self.calls.append(body)
            number = len(self.calls)  # before anything is awaited: the next call may come meanwhile
            self.times.append(time.monotonic())
            fault = self.faults.popleft() if self.faults else self.always
            await asyncio.sleep(self.delay)
            while self.held_from is not None and number > self.held_from:
                await asyncio.sleep(0.01)
            return FAULTS[fault](self, body) if fault else self._answer(request, body)
        finally:
            self.at_once -= 1

    def _answer(self, request: Request, body: dict[str, Any]) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, "wrong key " + request.headers.get("authorization", ""))
        reply = self.known.get(body["messages"][0]["content"])
        if reply is None:
            return error(400, "a prompt that the server does not know")
        return JSONResponse(completion(body, reply))


def completion(body: dict[str, Any], reply: Tokens | str) -> dict[str, Any]:
    """A reply as the real endpoint writes it."""
    text = reply if isinstance(reply, str) else max(reply, key=lambda t: reply[t])
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if isinstance(reply, dict) and body.get("logprobs"):
        top = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in reply.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top[: body["top_logprobs"]]}]}
    words = len(body["messages"][0]["content"].split())
    usage = {"prompt_tokens": words, "completion_tokens": 1, "total_tokens": words + 1}
    made = {"id": "fake", "object": "chat.completion", "created": 0, "model": body["model"]}
    return {**made, "choices": [choice], "usage": usage}


def error(status: int, message: str, code: str = "", **headers: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": code}}, status_code=status, headers=headers)


def whole(server: FakeServer, body: dict[str, Any]) -> dict[str, Any]:
    reply = server.known.get(body["messages"][0]["content"], {"50": 1.0})
    return completion(body, reply)


def cut_off(server: FakeServer, body: dict[str, Any]) -> Response:
    """Half of the bytes that were announced, then the connection closes."""
    data = json.dumps(whole(server, body)).encode()

    async def half() -> AsyncIterator[bytes]:
        yield data[: len(data) // 2]

    return StreamingResponse(
        half(), headers={"content-length": str(len(data))}, media_type="application/json", background=None
    )


def half_json(server: FakeServer, body: dict[str, Any]) -> Response:
    data = json.dumps(whole(server, body))
    return PlainTextResponse(data[: len(data) // 2], media_type="application/json")


def without_logprobs(server: FakeServer, body: dict[str, Any]) -> Response:
    return JSONResponse(completion({**body, "logprobs": False}, server.known[body["messages"][0]["content"]]))


FAULTS: dict[str, Callable[[FakeServer, dict[str, Any]], Response]] = {
    "refuses the key": lambda s, b: error(401, f"Incorrect API key provided: {s.key}"),
    "no such model": lambda s, b: error(404, "the model does not exist"),
    "rate limit": lambda s, b: error(429, "slow down", "rate_limit_exceeded", **{"retry-after": "0.15"}),
    "long rate limit": lambda s, b: error(429, "come back tomorrow", **{"retry-after": "86400"}),
    "no credit": lambda s, b: error(429, "no credit", "insufficient_quota"),
    "broken": lambda s, b: error(500, "internal"),
    "overloaded": lambda s, b: HTMLResponse("<html><body>Bad gateway</body></html>", status_code=502),
    "filter": lambda s, b: error(400, "filtered", "content_filter"),
    "logprobs not supported": lambda s, b: error(400, "logprobs is not supported with this model"),
    "html": lambda s, b: HTMLResponse("<!DOCTYPE html><html><body>Please sign in</body></html>"),
    "wrong json": lambda s, b: JSONResponse({"result": "fine"}),
    "empty choices": lambda s, b: JSONResponse({"choices": []}),
    "half json": half_json,
    "cut off": cut_off,
    "no logprobs": without_logprobs,
    "echoes the key": lambda s, b: JSONResponse(completion(b, {f"50 {s.key}": 0.1, s.key: 0.9})),
}
