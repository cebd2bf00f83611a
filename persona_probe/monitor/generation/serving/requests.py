"""A chat completion's request, checked; and errors in the shape that OpenAI's clients read."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError, near_matches
from persona_probe.evaluate.sampling.requests import SamplingConfig


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What one server takes.

    Raises:
        InputError: a limit below 1.
    """

    queue: int = 64
    """Requests that wait; the next one is refused with 503."""
    batch: int = 8
    """Answers written side by side."""
    body_bytes: int = 256 * 1024
    messages: int = 64
    """Messages of one conversation."""
    max_tokens: int = 1024
    """Longest answer that may be asked for."""
    default_tokens: int = 256
    """Longest answer where the request does not say."""
    wait_s: float = 300.0
    """Seconds that a request may wait before its answer begins."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 1:
                raise InputError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class ChatRequest:
    """What a client asks."""

    messages: Conversation
    config: SamplingConfig
    stream: bool = False
    include_usage: bool = False
    trace: bool = True
    """Whether the answer carries its features token by token."""


READ = {
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "n"),
    *("stream", "stream_options", "persona_probe"),
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), (0,)),
    **dict.fromkeys(("stop", "tools", "functions", "logit_bias", "response_format"), ({}, [], {"type": "text"})),
    **{"logprobs": (False,), "tool_choice": ("none",), "parallel_tool_calls": (True, False), "store": (False,)},
}
"""Settings of OpenAI's that are not available here, with the values that ask for nothing; null does so too."""
PASSED_OVER = {"user", "metadata", "safety_identifier", "service_tier"}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def bad(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that cannot be answered as it is."""
    return ApiError(400, message, code, param)


def read_request(body: object, model: str, limits: Limits) -> ChatRequest:
    """Check a request's JSON value.

    Raises:
        ApiError: what is wrong, and where.
    """
    if not isinstance(body, dict):
        raise bad("the body must be a JSON object")
    _check_keys(body)
    if not isinstance(body.get("model"), str):
        raise bad(f"you must name the model: {model!r}", "model", "missing_required_parameter")
    if body["model"] != model:
        raise ApiError(
            404, f"there is no model {body['model'][:100]!r} here: ask for {model!r}", "model_not_found", "model"
        )
    messages = _messages(body.get("messages"), limits)
    stream = _flag(body, "stream", False)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise bad("stream_options may hold include_usage", "stream_options")
    own = body.get("persona_probe") or {}
    if not isinstance(own, dict) or set(own) - {"trace"}:
        raise bad("persona_probe may hold trace (true or false)", "persona_probe")
    return ChatRequest(
        messages, _config(body, limits), stream, _flag(options, "include_usage", False), _flag(own, "trace", True)
    )


def _check_keys(body: Mapping[str, Any]) -> None:
    for key, value in body.items():
        if key in READ or key in PASSED_OVER or value is None:
            continue
        if key not in NEUTRAL:
            known = near_matches(str(key)[:100], sorted(READ))
            raise bad(f"unrecognized request argument {str(key)[:100]!r}: {known}", str(key)[:100], "unknown_parameter")
        if not any(value == neutral for neutral in NEUTRAL[key]):
            raise bad(f"{key} is not available here: leave it out", key, "unsupported_parameter")


def _messages(value: object, limits: Limits) -> Conversation:
    if not isinstance(value, list) or not value:
        raise bad("messages must be a list with at least one message", "messages", "missing_required_parameter")
    if len(value) > limits.messages:
        raise bad(
            f"{len(value)} messages are too many: send at most {limits.messages}", "messages", "too_many_messages"
        )
    found = [_message(one, n) for n, one in enumerate(value)]
    if found[-1]["role"] != "user":
        raise bad("the last message must be the user's", "messages")
    return found


def _message(value: object, number: int) -> dict[str, str]:
    where = f"messages[{number}]"
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise bad(f"{where} needs a role of {', '.join(ROLES)}", f"{where}.role")
    content = value.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise bad(f"{where} holds a part that is no text: only text is read here", f"{where}.content")
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise bad(f"{where} needs a text as its content", f"{where}.content")
    if value.get("tool_calls"):
        raise bad(f"{where} holds tool calls, which are not available here", where, "unsupported_parameter")
    return {"role": ROLES[value["role"]], "content": content}


def _config(body: Mapping[str, Any], limits: Limits) -> SamplingConfig:
    if _whole(body, "n", 1, 1, 1 << 20) != 1:
        raise bad("n must be 1: send several requests, they are answered side by side", "n", "unsupported_parameter")
    tokens = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    default = min(limits.default_tokens, limits.max_tokens)
    return SamplingConfig(
        temperature=_number(body, "temperature", 1.0, 0.0, 2.0),
        top_p=_number(body, "top_p", 1.0, 1e-6, 1.0),
        max_new_tokens=_whole(body, tokens, default, 1, limits.max_tokens),
        seed=_whole(body, "seed", secrets.randbits(31), -(2**63), 2**63 - 1),
    )


def _flag(body: Mapping[str, Any], key: str, default: bool) -> bool:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad(f"{key} must be true or false", key)
    return value


def _number(body: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise bad(f"{key} must be a number from {low:g} to {high:g}", key)
    return float(value)


def _whole(body: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = body.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad(f"{key} must be a whole number from {low} to {high}", key)
    return value
