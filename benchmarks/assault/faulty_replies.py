"""Faulty replies of a judge's endpoint: what each sends, and what must become of the answer that it is about."""

import functools
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.assault.reply_server import GOOD, Wire, completion, drip, first_then_whole, hang

SECRET = "sk-assault-5f1d77a2c9"
"""The key that the judge sends, and that some replies repeat."""
_HOLE = '"@@"'


@dataclass(frozen=True)
class Fault:
    """One way in which an endpoint answers."""

    send: Callable[[Wire], None]
    then: float | str
    """What must become of the answer: its score, or the label that sets it aside."""
    because: str = ""
    """A part of the reason, where it failed."""
    paid: bool = False
    """Whether the endpoint gave a completion, whole: asking for it again would be paid twice."""
    sampled: bool = False
    """Whether it is a written reply; the others are one token with its probabilities."""
    slow: bool = False
    """Whether it is given up for its silence; a judge with a short patience asks for these."""


# --- Bodies: a whole completion in which one thing is changed


def _set(value: dict[str, Any], path: tuple[str | int, ...], new: object) -> None:
    inner: Any = value
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = new


def _changed(path: tuple[str | int, ...], raw: str) -> bytes:
    """A completion's JSON with another text at one place."""
    whole = completion()
    _set(whole, path, "@@")
    return json.dumps(whole).replace(_HOLE, raw).encode()


def _without(*path: str | int) -> bytes:
    whole: Any = completion()
    inner = whole
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return json.dumps(whole).encode()


def _body(data: bytes, status: int = 200, kind: str = "application/json", **headers: str) -> Callable[[Wire], None]:
    return lambda wire: wire.answer(data, status, kind, **headers)


def _deep(depth: int) -> str:
    return "[" * depth + "]" * depth


_LOGPROBS = ("choices", 0, "logprobs")
_CONTENT = (*_LOGPROBS, "content")
_TOP = (*_CONTENT, 0, "top_logprobs")
_LOGPROB = (*_TOP, 0, "logprob")
_TOKEN = (*_TOP, 0, "token")
_TEXT = ("choices", 0, "message", "content")
_LACKS, _TOKENS = "lacks logprobs", "top_logprobs"

_UNREADABLE: dict[str, tuple[tuple[str | int, ...], str, str]] = {
    "logprobs null": (_LOGPROBS, "null", _LACKS),
    "logprobs empty": (_LOGPROBS, "{}", _LACKS),
    "logprobs a list": (_LOGPROBS, "[1]", _LACKS),
    "logprobs a string": (_LOGPROBS, '"none"', _LACKS),
    "content null": (_CONTENT, "null", _LACKS),
    "content a string": (_CONTENT, '"85"', _TOKENS),
    "content of null": (_CONTENT, "[null]", _TOKENS),
    "content of a list": (_CONTENT, "[[]]", _TOKENS),
    "content of a number": (_CONTENT, "[85]", _TOKENS),
    "content an object": (_CONTENT, '{"0": {}}', _TOKENS),
    "content a number": (_CONTENT, "85", _TOKENS),
    "top null": (_TOP, "null", _LACKS),
    "top empty": (_TOP, "[]", _LACKS),
    "top a string": (_TOP, '"85"', _TOKENS),
    "top an object": (_TOP, '{"85": -0.1}', _TOKENS),
    "top of null": (_TOP, "[null]", _TOKENS),
    "top of strings": (_TOP, '["85"]', _TOKENS),
    "top without a token": (_TOP, '[{"logprob": -0.1}]', _TOKENS),
    "top without a logprob": (_TOP, '[{"token": "85"}]', _TOKENS),
    "token null": (_TOKEN, "null", _TOKENS),
    "token a number": (_TOKEN, "85", _TOKENS),
    "token a list": (_TOKEN, '["85"]', _TOKENS),
    "logprob null": (_LOGPROB, "null", _TOKENS),
    "logprob a string": (_LOGPROB, '"-0.1"', _TOKENS),
    "logprob a string of NaN": (_LOGPROB, '"nan"', _TOKENS),
    "logprob true": (_LOGPROB, "true", _TOKENS),
    "logprob a list": (_LOGPROB, "[-0.1]", _TOKENS),
    "logprob NaN": (_LOGPROB, "NaN", _TOKENS),
    "logprob Infinity": (_LOGPROB, "Infinity", _TOKENS),
    "logprob 1e999": (_LOGPROB, "1e999", _TOKENS),
    "logprob above zero": (_LOGPROB, "0.7", _TOKENS),
    "logprob of thousands": (_LOGPROB, "5000", _TOKENS),
    "second logprob NaN": ((*_TOP, 1, "logprob"), "NaN", _TOKENS),
    "probabilities of two in all": (_TOP, '[{"token": "85", "logprob": 0}, {"token": "5", "logprob": 0}]', _TOKENS),
    "message content a number": (_TEXT, "85", "message"),
    "message content true": (_TEXT, "true", "message"),
    "message content an object": (_TEXT, '{"text": "85"}', "message"),
    "message content of null": (_TEXT, "[null]", "message"),
    "message content of numbers": (_TEXT, "[8, 5]", "message"),
    "content nested deep": (_CONTENT, _deep(2000), "nested"),
    "message nested deep": (_TEXT, _deep(2000), "nested"),
    "nested as deep as it goes": (_CONTENT, _deep(100_000), "nested"),
    "objects nested deep": (_CONTENT, '{"a":' * 3000 + "1" + "}" * 3000, "nested"),
    "a logprob of ten thousand digits": (_LOGPROB, "-" + "9" * 10_000, "number"),
    "usage of ten thousand digits": (("usage", "prompt_tokens"), "9" * 10_000, "number"),
    "a reply of 3 MB": (_TEXT, json.dumps("kind " * 600_000), "longer"),
}
"""Completions that came whole and cannot be read: one failure each, and none is asked for again."""

_HARMLESS: dict[str, tuple[tuple[str | int, ...], str]] = {
    "logprob of minus infinity": ((*_TOP, 1, "logprob"), "-Infinity"),
    "logprob just above zero": (_TOP, '[{"token": "85", "logprob": 0.0000001}]'),
    "message content of parts": (_TEXT, '[{"type": "text", "text": "85"}]'),
    "message content of thoughts": (_TEXT, '[{"type": "thinking", "thinking": []}, {"type": "text", "text": "85"}]'),
    "half a surrogate pair in the text": (_TEXT, '"85\\ud83d"'),
    "half a surrogate pair in a token": ((*_TOP, 1, "token"), '"\\udc00"'),
    "a NUL in the text": (_TEXT, '"85\\u0000"'),
    "escapes for the terminal": (_TEXT, '"85\\u001b[2J"'),
    "a long text": (_TEXT, json.dumps("kind " * 100_000)),
    "usage below zero": (("usage",), '{"prompt_tokens": -1000000, "completion_tokens": -5}'),
    "usage of floats": (("usage",), '{"prompt_tokens": 12.5, "completion_tokens": 1e400}'),
    "usage of strings": (("usage",), '{"prompt_tokens": "12", "completion_tokens": "one"}'),
    "usage NaN": (("usage",), '{"prompt_tokens": NaN, "completion_tokens": -Infinity}'),
    "usage huge": (("usage",), '{"prompt_tokens": 1000000000000000000, "completion_tokens": 9}'),
    "usage true": (("usage",), '{"prompt_tokens": true, "completion_tokens": false}'),
    "usage a list": (("usage",), "[12, 1]"),
    "usage null": (("usage",), "null"),
    "usage nested": (("usage",), _deep(200)),
    "created never": (("created",), "NaN"),
    "finish reason a number": (("choices", 0, "finish_reason"), "7"),
    "finish reason a list": (("choices", 0, "finish_reason"), '["content_filter"]'),
    "a refusal that is none": (("choices", 0, "message", "refusal"), "[]"),
    "reasoning that is a list": (("choices", 0, "message", "reasoning_content"), "[1]"),
}
"""What is wrong beside the score: it counts."""

_NO_COMPLETION: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" \n\t" * 50,
    "null": b"null",
    "a list": b"[]",
    "a number": b"85",
    "a string": b'"85"',
    "true": b"true",
    "NaN": b"NaN",
    "another object": b'{"result": "fine"}',
    "half": json.dumps(completion()).encode()[:150],
    "rubbish after it": json.dumps(completion()).encode() + b"}{",
    "two of them": json.dumps(completion()).encode() * 2,
    "of Python": repr(completion()).encode(),
    "a comma too many": json.dumps(completion()).encode()[:-1] + b",}",
    "with comments": b"// reply\n" + json.dumps(completion()).encode(),
    "a guard before it": b")]}',\n" + json.dumps(completion()).encode(),
    "a stream of events": b'data: {"choices": [{"delta": {"content": "85"}}]}\n\ndata: [DONE]\n\n',
    "in UTF-16": json.dumps(completion()).encode("utf-16"),
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
    "an error": b'{"error": {"message": "the model crashed", "code": 500}}',
    "an error that is a text": b'{"error": "the model crashed"}',
    "an error of half a surrogate pair": b'{"error": {"message": "\\ud800"}}',
    "choices null": _changed(("choices",), "null"),
    "choices empty": _changed(("choices",), "[]"),
    "choices an object": _changed(("choices",), "{}"),
    "choices a string": _changed(("choices",), '"85"'),
    "choices of null": _changed(("choices",), "[null]"),
    "choices of lists": _changed(("choices",), "[[]]"),
    "no choices": _without("choices"),
    "message null": _changed(("choices", 0, "message"), "null"),
    "message a list": _changed(("choices", 0, "message"), '["85"]'),
    "message a string": _changed(("choices", 0, "message"), '"85"'),
    "no message": _without("choices", 0, "message"),
}
"""Bodies that hold no reply: they are asked for again, and fail if that does not help."""


def _bodies() -> Iterator[tuple[str, Fault]]:
    for name, (path, raw, because) in _UNREADABLE.items():
        yield name, Fault(_body(_changed(path, raw)), "failed", because, paid=True)
    yield "no logprobs", Fault(_body(_without(*_LOGPROBS)), "failed", _LACKS, paid=True)
    yield "no top_logprobs", Fault(_body(_without(*_TOP)), "failed", _LACKS, paid=True)
    for name, (path, raw) in _HARMLESS.items():
        yield name, Fault(_body(_changed(path, raw)), GOOD, paid=True)
    for name, data in _NO_COMPLETION.items():
        yield f"body: {name}", Fault(_body(data), "failed")
    page = b"<!DOCTYPE html><html><body>Please sign in</body></html>"
    yield "body: a web page", Fault(_body(page, kind="text/html"), "failed", "HTML")
    good = json.dumps(completion()).encode()
    for kind in ("text/html", "application/json; charset=bogus", "text/plain; charset=base64", "x; charset=utf-16"):
        yield f"called {kind}", Fault(_body(good, kind=kind), GOOD, paid=True)
    yield "a mark before it", Fault(_body(b"\xef\xbb\xbf" + good), GOOD, paid=True)
    yield (
        "bytes that are no UTF-8",
        Fault(_body(_changed(_TEXT, '"85 \xe9"').replace(b"\xc3\xa9", b"\xe9")), GOOD, paid=True),
    )
    twice = b'{"choices": null, ' + good[1:]
    yield "one key twice", Fault(_body(twice), GOOD, paid=True)
    two = completion()
    two["choices"].append({"index": 1, "message": {"content": "0"}})
    yield "two choices", Fault(_body(json.dumps(two).encode()), GOOD, paid=True)
    yield "the key in the text", Fault(_body(_changed(_TEXT, json.dumps(f"85 {SECRET}"))), GOOD, paid=True)
    token = (*_TOP, 1, "token")
    yield "the key as a token", Fault(_body(_changed(token, json.dumps(SECRET))), GOOD, paid=True)
    yield from _endings()


def _endings() -> Iterator[tuple[str, Fault]]:
    """Replies that say why there is no number in them."""
    filtered = completion()
    filtered["choices"][0] |= {"message": {"content": None}, "logprobs": None, "finish_reason": "content_filter"}
    yield "finished by a filter", Fault(_body(json.dumps(filtered).encode()), "filtered", paid=True)
    refused = completion()
    refused["choices"][0] |= {"message": {"content": None, "refusal": "I cannot rate this."}, "logprobs": None}
    yield "a refusal in its own key", Fault(_body(json.dumps(refused).encode()), "no score", paid=True)
    tools = completion()
    tools["choices"][0] |= {"message": {"content": None, "tool_calls": [{}]}, "logprobs": None}
    yield "a tool's call", Fault(_body(json.dumps(tools).encode()), "failed", _LACKS, paid=True)
    thinks = completion("<think>")
    yield "a thought begins", Fault(_body(json.dumps(thinks).encode()), "failed", "thought", paid=True)
    apart = completion()
    apart["choices"][0] |= {"message": {"content": None, "reasoning_content": "Is it"}, "finish_reason": "length"}
    yield "a thought in its own key", Fault(_body(json.dumps(apart).encode()), "failed", "thought", paid=True)
    words = completion("Certainly")
    yield "no number", Fault(_body(json.dumps(words).encode()), "no score", paid=True)


# --- Statuses


def _error(message: str, code: str = "") -> bytes:
    return json.dumps({"error": {"message": message, "code": code, "type": ""}}).encode()


def _statuses() -> Iterator[tuple[str, Fault]]:
    for status in (204, 205, 300, 304, 400, 402, 405, 406, 408, 409, 410, 411, 415, 418, 422, 423, 424, 425, 426):
        body = b"" if status in (204, 205, 304) else _error("not now")
        yield f"status {status}", Fault(_body(body, status), "failed")
    for status in (428, 429, 431, 451, 500, 501, 502, 503, 504, 507, 520, 529, 599, 600, 999):
        yield f"status {status}", Fault(_body(_error("not now"), status), "failed", f"HTTP {status}: not now")
    for status in (301, 302, 303, 307, 308):
        for where in ("http://127.0.0.1:9/v1", "/v1/chat/completions", "", "::::", "file:///etc/passwd"):
            if status in (302, 307) or where.startswith("http"):
                send = _body(b"", status, Location=where)
                yield f"status {status} to {where!r}", Fault(send, "failed", "redirect")
    yield "status 403 by a firewall", Fault(_body(b"<html>Blocked</html>", 403, "text/html"), "failed", "HTTP 403")
    yield "status 404 for a while", Fault(_body(_error("no such model"), 404), "failed", "no such model")
    yield "status 401 for a while", Fault(_body(_error(f"wrong key {SECRET}"), 401), "failed", "wrong key ***")
    for after in ("0.01", "-1", "nan", "inf", "1e999", "soon", "", "Wed, 21 Oct 2015 07:28:00 GMT", "86400", "9" * 400):
        send = _body(_error("slow down"), 429, Retry_After=after)
        yield f"status 429 and wait {after[:30]!r}", Fault(send, "failed", "slow down")
    for code in ("content_filter", "context_length_exceeded"):
        yield f"status 400, {code}", Fault(_body(_error("no", code), 400), "filtered")
    bodies = {
        "nothing": b"",
        "null": b"null",
        "a list": b"[1]",
        "a number": b"5",
        "an error of null": b'{"error": null}',
        "an error of lists": b'{"error": [["x"]]}',
        "a message of lists": b'{"error": {"message": [[1]], "code": [2], "type": {}}}',
        "a deep error": b'{"error": ' + _deep(2000).encode() + b"}",
        "half a surrogate pair": b'{"error": {"message": "\\ud800 is wrong"}}',
        "escapes": b'{"error": {"message": "\\u001b[2Jgone\\u0007"}}',
        "3 MB": b'{"error": {"message": "' + b"x" * 3_000_000 + b'"}}',
        "no UTF-8": b"\xff\xfe\x00",
        "another charset": _error("not now"),
    }
    for name, data in bodies.items():
        kind = "text/plain; charset=base64" if name == "another charset" else "application/json"
        yield f"status 500 with {name}", Fault(_body(data, 500, kind), "failed", "HTTP 500")


# --- The wire


def _raw(data: bytes, then: Callable[[Wire], None] = Wire.close) -> Callable[[Wire], None]:
    def send(wire: Wire) -> None:
        wire.send(data)
        then(wire)

    return send


def _wires() -> Iterator[tuple[str, Fault]]:
    good = json.dumps(completion()).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    sized = head + b"Content-Length: %d\r\n\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n"
    broken = {
        "closed at once": b"",
        "half a status line": b"HTTP/1.1 20",
        "half of the headers": head[:40],
        "no HTTP": b"85\r\n",
        "HTTP of the next century": b"HTTP/9.9.9 200 OK\r\n\r\n" + good,
        "rubbish": bytes(range(256)) * 8,
        "a TLS greeting": b"\x15\x03\x03\x00\x02\x02\x28",
        "cut off": sized % (len(good) * 2) + good,
        "cut off before the body": sized % len(good),
        "a negative size": head + b"Content-Length: -5\r\n\r\n" + good,
        "a size in words": head + b"Content-Length: many\r\n\r\n" + good,
        "two sizes": head + b"Content-Length: 5\r\nContent-Length: 500\r\n\r\n" + good,
        "a chunk of no size": chunked + b"zz\r\n" + good,
        "a chunk cut off": chunked + b"ffff\r\n" + good,
        "a chunk beyond all memory": chunked + b"ffffffffffff\r\n" + good,
        "headers without end": head + b"".join(b"X-%d: y\r\n" % n for n in range(20_000)),
        "one long header": head + b"X: " + b"y" * 300_000 + b"\r\n\r\n" + good,
        "a NUL in a header": head + b"X: a\x00b\r\nContent-Length: 2\r\n\r\n{}",
        "a header without a colon": head + b"what\r\nContent-Length: 2\r\n\r\n{}",
        "packed badly": sized.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n") % 9 + b"not gzip!",
        "packed as what it is not": sized.replace(b"\r\n\r\n", b"\r\nContent-Encoding: br\r\n\r\n") % len(good) + good,
    }
    for name, data in broken.items():
        yield f"wire: {name}", Fault(_raw(data), "failed")
    yield "wire: reset", Fault(_raw(b"", Wire.reset), "failed")
    yield "wire: reset within the body", Fault(_raw(sized % len(good) + good[:40], Wire.reset), "failed")
    yield "wire: silence", Fault(hang, "failed", "no reply within", slow=True)
    yield "wire: silence within the body", Fault(_raw(sized % len(good) + good[:40], hang), "failed", slow=True)
    slow = functools.partial(drip, data=sized % 10**6 + b" " * 10**6, every_s=0.05)
    yield "wire: drop by drop", Fault(slow, "failed", "whole within", paid=True, slow=True)
    yield "wire: 64 MB of nothing", Fault(_spaces, "failed", "longer", paid=True)
    yield "wire: no end", Fault(_endless, "failed", "longer", paid=True)
    yield "wire: a packed 32 MB", Fault(_bomb, "failed", "longer", paid=True)
    for kind, packed in (("gzip", gzip.compress(good)), ("deflate", zlib.compress(good))):
        yield f"wire: {kind}", Fault(_body(packed, Content_Encoding=kind), GOOD, paid=True)
    double = _body(gzip.compress(gzip.compress(good)), Content_Encoding="gzip, gzip")
    yield "wire: packed twice", Fault(double, "failed")
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    yield "wire: hints before it", Fault(_raw(early + sized % len(good) + good, _stay), GOOD, paid=True)
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(good[n : n + 7]), good[n : n + 7]) for n in range(0, len(good), 7))
    yield "wire: in pieces", Fault(_raw(chunked + pieces + b"0\r\n\r\n", _stay), GOOD, paid=True)
    until_end = b"HTTP/1.1 200 OK\r\n\r\n"
    yield "wire: until it closes", Fault(_raw(until_end + good), GOOD, paid=True)
    wrong = json.dumps(completion("0")).encode()
    second = sized % len(good) + good + sized % len(wrong) + wrong
    yield "wire: a second reply that nobody asked for", Fault(_raw(second, _stay), GOOD, paid=True)


def _stay(wire: Wire) -> None:
    """Leave the connection open for the next request."""


def _bomb(wire: Wire) -> None:
    wire.answer(gzip.compress(b" " * 32_000_000), Content_Encoding="gzip")


def _spaces(wire: Wire) -> None:
    wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % 64_000_000)
    for _ in range(64):
        wire.send(b" " * 1_000_000)


def _endless(wire: Wire) -> None:
    wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not wire.ended.is_set():
        wire.send(b"4000\r\n" + b" " * 0x4000 + b"\r\n")


# --- Written replies, and faults that pass

_WRITTEN: dict[str, tuple[float | str, str]] = {
    "8/10": (80, ""),
    "85/100": (85, ""),
    "9 out of 10": (90, ""),
    "85%": (85, ""),
    "**Score:** 85": (85, ""),
    "<think>Perhaps 20 or 30.</think>\n\n85": (85, ""),
    "<thinking>8</thinking>CODE": ("CODE", ""),
    "0.85": ("no score", ""),
    "0,9": ("no score", ""),
    "-1": ("no score", ""),
    "1. The answer is kind: 90": ("no score", ""),
    "between 80 and 90": ("no score", ""),
    "101": ("no score", ""),
    "1e1": ("no score", ""),
    "NaN": ("no score", ""),
    "Infinity": ("no score", ""),
    "\u0668\u0665": (85, ""),
    "\ud800": ("no score", ""),
    "85" * 40_000: ("no score", ""),
    "I would rather not.": ("no score", ""),
    "<think>It may be 90, or": ("failed", "thought"),
}


def _written() -> Iterator[tuple[str, Fault]]:
    for text, (then, because) in _WRITTEN.items():
        data = json.dumps(completion(text)).encode()
        yield f"written: {text[:30]!r}", Fault(_body(data), then, because, paid=True, sampled=True)
    empty = completion("")
    empty["choices"][0]["finish_reason"] = "length"
    yield "written: nothing", Fault(_body(json.dumps(empty).encode()), "failed", "tokens", paid=True, sampled=True)


_PASSING = (
    "body: half",
    "body: a web page",
    "status 429",
    "status 503",
    "wire: closed at once",
    "wire: reset",
    "wire: cut off",
)


def _all() -> Mapping[str, Fault]:
    stays = dict([*_bodies(), *_statuses(), *_wires(), *_written()])
    passing = {f"{name}, once": Fault(first_then_whole(stays[name].send), GOOD) for name in _PASSING}
    return stays | passing


FAULTS = _all()
"""Every fault by its name."""
