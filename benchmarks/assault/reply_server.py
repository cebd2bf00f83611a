"""A judge's endpoint on this machine that answers as it is told, over plain sockets: no library mends its replies."""

import contextlib
import json
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

GOOD = 85
"""The score in every reply that is whole."""


def completion(text: str = str(GOOD)) -> dict[str, Any]:
    """A whole chat completion, with the probabilities of its one token."""
    likely = [{"token": text, "logprob": -0.1}, {"token": "the", "logprob": -3.0}]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": {"content": [{**likely[0], "top_logprobs": likely}]},
    }
    made = {"id": "one", "object": "chat.completion", "created": 0, "model": "judge"}
    return {**made, "choices": [choice], "usage": {"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 13}}


class Wire:
    """One request that came, and the connection to answer it on."""

    def __init__(
        self, connection: socket.socket, request: Mapping[str, Any], attempt: int, ended: threading.Event
    ) -> None:
        self.connection, self.request = connection, request
        self.attempt = attempt
        """How often this prompt has come, with this time."""
        self.ended = ended
        """Set when the server stops: nothing waits longer than this."""

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.connection.sendall(data)

    def answer(self, body: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> None:
        """Send a response with a body; an underscore in a header's name stands for a dash."""
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def whole(self) -> None:
        """Answer as an endpoint should."""
        self.answer(json.dumps(completion()).encode())

    def reset(self) -> None:
        """End the connection as a crash does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class ReplyServer:
    """Answers requests by the name that stands before the first `|` of their prompt.

    Args:
        faults: name -> how that prompt is answered; other prompts get a whole reply.
    """

    def __init__(self, faults: Mapping[str, Callable[[Wire], None]]) -> None:
        self.faults = dict(faults)
        self.asked: Counter[str] = Counter()
        """Requests by name."""
        self.bodies: list[dict[str, Any]] = []
        """Every request, in the order in which they came."""
        self.key = ""
        """The key that the last request carried."""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    outer._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = allow_reuse_address = True
            request_queue_size = 64

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """Its address, as a judge takes it."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "ReplyServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, connection: socket.socket) -> None:
        """Answer the requests of one connection until it ends."""
        held = b""
        while True:
            head, body, held = _request(connection, held)
            if not head:
                return
            request = json.loads(body)
            name = str(request["messages"][0]["content"]).partition("|")[0]
            with self._lock:
                self.asked[name] += 1
                attempt = self.asked[name]
                self.bodies.append(request)
                self.key = head.lower().partition("authorization: bearer ")[2].partition("\r\n")[0]
            self.faults.get(name, Wire.whole)(Wire(connection, request, attempt, self._ended))


def _request(connection: socket.socket, held: bytes) -> tuple[str, bytes, bytes]:
    """Head and body of the next request, and the bytes that came after it; an empty head is the connection's end."""
    while b"\r\n\r\n" not in held:
        if not (more := connection.recv(65536)):
            return "", b"", b""
        held += more
    head, _, body = held.partition(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    while len(body) < size:
        if not (more := connection.recv(65536)):
            return "", b"", b""
        body += more
    return head.decode("latin-1"), body[:size], body[size:]


def first_then_whole(fault: Callable[[Wire], None]) -> Callable[[Wire], None]:
    """A fault of a prompt's first request only."""
    return lambda wire: fault(wire) if wire.attempt == 1 else wire.whole()


def drip(wire: Wire, data: bytes, every_s: float) -> None:
    """Send bytes one by one, until they end or the other side goes away."""
    for place in range(len(data)):
        wire.send(data[place : place + 1])
        if wire.ended.wait(every_s):
            return


def hang(wire: Wire, at_most_s: float = 60.0) -> None:
    """Say nothing more."""
    until = time.monotonic() + at_most_s
    while time.monotonic() < until and not wire.ended.wait(0.05):
        pass
    wire.close()
