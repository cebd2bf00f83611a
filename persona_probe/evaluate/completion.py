"""Replies of a chat-completions endpoint as they come: read no further than asked for, checked, or what is wrong."""

import importlib
import json
import re
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_DEEPEST = 40
"""Levels of a completion's JSON; real ones have about eight."""
_MOST_TOKENS = 10_000_000
"""No call takes more: a larger count is none."""
_HALVES = re.compile("[\ud800-\udfff]")


class Malformed(Exception):
    """A body that cannot be read as a chat completion.

    Args:
        again: whether it holds no reply at all, so that it is worth another try; what came whole is paid for.
    """

    def __init__(self, message: str, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


@dataclass(frozen=True)
class Completion:
    """One chat completion, checked: its text is text, and its counts are counts."""

    choice: Mapping[str, Any]
    """The first choice; it has a `message`."""
    text: str
    """What the model wrote, without the thoughts that some endpoints send as parts of their own."""
    prompt_tokens: int | None
    """As the endpoint counts them; None if it does not, or gives what cannot be a count."""
    completion_tokens: int | None

    @classmethod
    def of(cls, body: str, masked: Callable[[str], str] = str) -> "Completion":
        """Read a body.

        Args:
            masked: hides the endpoint's key in a string; every string of the reply passes it, after it is read.

        Raises:
            Malformed: HTML, broken or other JSON, too deep, or a message of a wrong type.
        """
        data = _decoded(body)
        choices = data.get("choices") if isinstance(data, dict) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(data, dict) or not isinstance(first, dict) or not isinstance(first.get("message"), dict):
            said = f"; it says: {masked(error_message(data))}" if isinstance(data, dict) and data.get("error") else ""
            what = f"JSON that is no chat completion (no choices with a message): check base_url and model{said}"
            raise Malformed(what, again=True)
        choice = _cleaned(first, masked)
        usage = data.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        prompt, reply = (_count(counts.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        return cls(choice, _text_of(choice["message"].get("content")), prompt or None, reply)

    def message_text(self, *names: str) -> str:
        """The first of some keys of the message that holds text, such as `refusal`; empty if none does."""
        values = (self.choice["message"].get(name) for name in names)
        return next((value for value in values if isinstance(value, str) and value), "")

    @property
    def finish(self) -> str:
        """Why it ended, as the endpoint says: `stop`, `length`, `content_filter`; empty if it does not."""
        reason = self.choice.get("finish_reason")
        return reason if isinstance(reason, str) else ""


def _decoded(body: str) -> object:
    try:
        return json.loads(body)
    except json.JSONDecodeError:
        start = body.lstrip()[:15].lower()
        what = "HTML" if start.startswith(("<!doctype", "<html")) else "cut-off or broken JSON"
        raise Malformed(f"{what} in place of a chat completion: check base_url", again=True) from None
    except RecursionError:
        raise Malformed(f"JSON that is nested more than {_DEEPEST} deep") from None
    except ValueError:
        raise Malformed("JSON with a number that is too long to read") from None


def _cleaned(value: Any, masked: Callable[[str], str], depth: int = 0) -> Any:
    """A JSON value whose strings hold neither the key nor half of a surrogate pair, which no file can hold."""
    if depth > _DEEPEST:
        raise Malformed(f"JSON that is nested more than {_DEEPEST} deep")
    if isinstance(value, str):
        return masked(whole_characters(value))
    if isinstance(value, list):
        return [_cleaned(inner, masked, depth + 1) for inner in value]
    if isinstance(value, dict):
        return {_cleaned(name, masked): _cleaned(inner, masked, depth + 1) for name, inner in value.items()}
    return value


def whole_characters(text: str) -> str:
    """`text` with a replacement character for each half of a surrogate pair."""
    return _HALVES.sub("\ufffd", text)


def _text_of(content: object) -> str:
    """The text of a message: a string, or the text of a list's parts (thoughts are parts of another type)."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise Malformed(f"a message whose content is no text, but {type(content).__name__}")


def _count(value: object) -> int | None:
    """A number of tokens; None for what cannot be one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    whole = value == value // 1  # not so of NaN and infinity
    return int(value) if whole and 0 <= value <= _MOST_TOKENS else None


# --- What an error's body says

_LONGEST_MESSAGE = 200


def error_of(body: object) -> object:
    """The error that a body holds, as an object where it is JSON; else the body."""
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except (ValueError, RecursionError):
            return body
    return body.get("error", body) if isinstance(body, dict) else body


def error_code(body: object) -> str:
    """The code, or else the type, of an error; empty if it has none."""
    error = error_of(body)
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


def error_message(body: object) -> str:
    """One line of an error's text, cut to a readable length."""
    error = error_of(body)
    text = str(error.get("message") or error) if isinstance(error, dict) else str(error or "no text")
    return " ".join(whole_characters(text[: 10 * _LONGEST_MESSAGE]).split())[:_LONGEST_MESSAGE]


# --- The body of a response, no longer than what was asked for

_PACKED = {"": 0, "identity": 0, "gzip": 31, "x-gzip": 31, "deflate": 15}
"""Encodings, with zlib's window bits. None is asked for; some servers pack all the same."""


def read_body(response: Any, most: int, seconds: float) -> str:
    """Read a response as UTF-8 text, and put that in the place of its stream, so that no library reads it otherwise.

    Of an error's body the beginning is enough: it is cut.

    Raises:
        Malformed: longer than `most` bytes, slower than `seconds`, or packed in a way that was not asked for.
    """
    data, fault = b"", None
    try:
        data = _unpacked(_received(response, most, seconds), response.headers.get("content-encoding", ""), most)
        if len(data) > most and response.status_code < 400:
            raise Malformed(f"a reply longer than {most / 2**20:.1f} MB, more than was asked for")
    except Malformed as error:
        fault = error
    text = data[:most].decode("utf-8-sig", "replace")
    for name in ("content-encoding", "transfer-encoding", "content-length"):
        response.headers.pop(name, None)
    response.headers["content-type"] = "text/plain; charset=utf-8"
    library = importlib.import_module(type(response).__module__.partition(".")[0])  # httpx, or httpx2 of newer clients
    response.stream = library.ByteStream(text.encode())
    response.read()
    if fault is not None:
        raise fault
    return text


def _received(response: Any, most: int, seconds: float) -> bytes:
    """The bytes of a response as they came; it stops soon after `most`."""
    until = time.monotonic() + seconds
    data = bytearray()
    try:
        for piece in response.stream:
            data += piece
            if time.monotonic() > until:
                raise Malformed(f"a reply that is not whole within {seconds:g} s")
            if len(data) > most:
                break
    finally:
        response.stream.close()
    return bytes(data)


def _unpacked(data: bytes, encoding: str, most: int) -> bytes:
    bits = _PACKED.get(encoding.strip().lower())
    if bits is None:
        raise Malformed(f"a reply packed as {encoding[:40]!r}, which was not asked for", again=True)
    try:
        return zlib.decompressobj(bits).decompress(data, most + 1) if bits else data
    except zlib.error:
        raise Malformed("a packed reply that cannot be unpacked", again=True) from None
