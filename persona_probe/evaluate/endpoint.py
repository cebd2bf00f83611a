"""Chat completions from any endpoint that speaks OpenAI's format: key, budget, requests, and what errors mean."""

import importlib.util
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from persona_probe.data.chat import Message
from persona_probe.errors import InputError

log = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
_MASK = "***"


class Key:
    """An endpoint's key, read from the environment. Only `value` holds its text: no repr and no message shows it."""

    def __init__(self, value: str) -> None:
        self.value = value

    @classmethod
    def from_environment(cls, variable: str | None) -> "Key":
        """The key in an environment variable; None is for endpoints that need none.

        Raises:
            InputError: the variable is not set.
        """
        if variable is None:
            return cls("")
        value = os.environ.get(variable, "").strip()
        if not value:
            raise InputError(f"no key in the environment: set {variable}, or name another variable as key_variable")
        return cls(value)

    def masked(self, text: str) -> str:
        """`text` without the key: endpoints repeat it in their error messages."""
        return text.replace(self.value, _MASK) if self.value else text

    def __repr__(self) -> str:
        return f"Key({_MASK})"


# --- What requests may cost: a limit in calls and tokens, counted as they are sent

BYTES_PER_TOKEN = 4.0
"""Roughly that of English text: estimates are off by ten to twenty percent."""
_MESSAGE_TOKENS = 4
"""What a chat format adds to each message."""


def estimate_tokens(messages: Sequence[Message]) -> int:
    """Tokens of a prompt, estimated from its length in bytes."""
    return sum(math.ceil(len(m["content"].encode()) / BYTES_PER_TOKEN) + _MESSAGE_TOKENS for m in messages)


class BudgetSpent(BaseException):
    """The next call would exceed the limit. It is no `Exception`, so that the openai client does not retry it."""


class Budget:
    """A limit in calls and tokens (None: no limit), and what was spent of it. Threads may share one.

    Every call that is sent counts, retries too. Before a call, its estimated tokens are reserved, so that concurrent
    calls do not exceed the limit together. Afterwards the endpoint's own count replaces the estimate.

    Raises:
        InputError: a limit below zero.
    """

    def __init__(self, calls: int | None = None, tokens: int | None = None) -> None:
        for name, limit in (("calls", calls), ("tokens", tokens)):
            if limit is not None and limit < 0:
                raise InputError(f"the budget in {name} is {limit}: give zero or more")
        self.most_calls, self.most_tokens = calls, tokens
        self.calls = 0
        self.tokens = 0
        self.stopped = ""
        """Why it stopped; empty while it has not."""
        self._lock = threading.Lock()

    def reserve(self, tokens: int) -> None:
        """Set one call and its tokens aside.

        Raises:
            BudgetSpent: the limit would be exceeded.
        """
        with self._lock:
            if self.most_calls is not None and self.calls + 1 > self.most_calls:
                self.stopped = f"the budget of {self.most_calls} calls is spent"
            elif self.most_tokens is not None and self.tokens + tokens > self.most_tokens:
                self.stopped = f"the budget of {self.most_tokens} tokens is spent ({self.tokens} used)"
            else:
                self.calls, self.tokens, self.stopped = self.calls + 1, self.tokens + tokens, ""
                return
            raise BudgetSpent(self.stopped)

    def settle(self, reserved: int, used: int) -> None:
        """Replace an estimate by what a call took (0 if the endpoint turned it away)."""
        with self._lock:
            self.tokens += used - reserved


# --- One chat completion, or what is wrong with it


class Malformed(Exception):
    """A body that is not a chat completion: worth another try."""


@dataclass(frozen=True)
class Completion:
    """One chat completion."""

    choice: Mapping[str, Any]
    """The first choice; it has a `message`."""
    prompt_tokens: int | None
    """As the endpoint counts them; None if it does not."""
    completion_tokens: int | None

    @classmethod
    def of(cls, body: str) -> "Completion":
        """Read a body.

        Raises:
            Malformed: HTML, broken or other JSON.
        """
        data = _decoded(body)
        choices = data.get("choices") if isinstance(data, dict) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(data, dict) or not isinstance(first, dict) or not isinstance(first.get("message"), dict):
            raise Malformed("JSON that is no chat completion (no choices with a message): check base_url and model")
        usage = data.get("usage")
        counts = usage if isinstance(usage, dict) else {}
        return cls(first, _whole_number(counts, "prompt_tokens"), _whole_number(counts, "completion_tokens"))

    @property
    def text(self) -> str:
        """What the model wrote."""
        return self.choice["message"].get("content") or ""


def _decoded(body: str) -> object:
    try:
        return json.loads(body)
    except json.JSONDecodeError:
        start = body.lstrip()[:15].lower()
        what = "HTML" if start.startswith(("<!doctype", "<html")) else "cut-off or broken JSON"
        raise Malformed(f"{what} in place of a chat completion: check base_url") from None


def _whole_number(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) else None


# --- The client: requests in threads, retried by the openai client itself

_FAULT = "x-persona-probe-fault"
"""Header that a response gets here if its body is no completion."""
_UNREAD = ("content_filter", "context_length_exceeded")
"""Error codes that concern one request: a content filter, or a prompt that is too long."""
_LONGEST_MESSAGE = 200


class Unanswered(Exception):
    """One request got no answer, after all retries. Others may succeed."""


class Unread(Unanswered):
    """The endpoint does not read this prompt: a content filter, or too long."""


class ChatClient:
    """Chat completions of one endpoint, for any number of threads.

    The `openai` client retries what may pass: 408, 409, 429, 5xx, lost connections, and here also bodies that are no
    completion. It waits as long as Retry-After asks.

    Args:
        base_url: where the endpoint is, such as `http://127.0.0.1:8000/v1`.
        key_variable: environment variable that holds the key; None sends none, for local servers.
        max_retries: how often a request is sent again.
        timeout: seconds without a byte from the endpoint.
        budget: a limit on what is sent.

    Raises:
        InputError: the `openai` package or the key is missing.
    """

    def __init__(
        self, base_url: str, key_variable: str | None, max_retries: int, timeout: float, budget: Budget | None = None
    ) -> None:
        if importlib.util.find_spec("openai") is None:
            raise InputError("endpoints need the extra `judges`: pip install 'persona-probe[judges]'")
        self.key, self.key_variable = Key.from_environment(key_variable), key_variable
        self.timeout, self.budget = timeout, budget or Budget()
        from openai import DefaultHttpxClient, OpenAI

        hooks: Any = {"request": [self._before], "response": [self._after]}
        self._openai = OpenAI(
            base_url=base_url,
            api_key=self.key.value or "none",
            max_retries=max_retries,
            timeout=timeout,
            http_client=DefaultHttpxClient(event_hooks=hooks),
        )

    @property
    def address(self) -> str:
        """Where the endpoint is, without a user name or password that its address may hold."""
        place = urlsplit(str(self._openai.base_url))
        return f"{place.scheme}://{place.netloc.rpartition('@')[2]}{place.path}"

    def complete(self, **request: Any) -> Completion:
        """Send one request, with retries.

        Args:
            request: the body: model, messages, max_tokens and further decoding parameters.

        Raises:
            InputError: no request can succeed, and what to change.
            Unanswered: this one got no answer.
            BudgetSpent: the budget does not allow it.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            response = self._openai.chat.completions.with_raw_response.create(**request)
        except APIStatusError as error:
            if fault := error.response.headers.get(_FAULT):
                self._give_up(fault)
            self._refuse(error.status_code, error.body or error.response.text)
        except APITimeoutError:
            self._give_up(f"no reply within {self.timeout:g} s: raise timeout or lower concurrency")
        except APIConnectionError as error:
            self._give_up(f"connection refused or cut off ({error.__cause__ or error}): check base_url")
        return Completion.of(self.key.masked(response.http_response.text))

    def _before(self, request: Any) -> None:
        """Called before every attempt."""
        attempt = 1 + int(request.headers.get("x-stainless-retry-count", 0))
        if attempt > 1:
            log.warning("%s: attempt %d follows a fault that may pass", self.address, attempt)
        self.budget.reserve(_estimate(request))

    def _after(self, response: Any) -> None:
        """Called after every attempt: count what it took, and mark what the client must retry, or must not."""
        response.read()
        estimate = _estimate(response.request)
        if response.status_code >= 400:
            self.budget.settle(estimate, 0)
            if _code(response.text) == "insufficient_quota":
                response.headers["x-should-retry"] = "false"
            return
        try:
            completion = Completion.of(response.text)
        except Malformed as fault:
            response.status_code = 502
            response.headers[_FAULT] = str(fault)
            return
        self.budget.settle(estimate, (completion.prompt_tokens or 0) + (completion.completion_tokens or 0) or estimate)

    def _give_up(self, message: str) -> NoReturn:
        raise Unanswered(self.key.masked(message))

    def _refuse(self, status: int, body: object) -> NoReturn:
        """Raise what an HTTP error means."""
        code, message = _code(body), self.key.masked(f"HTTP {status}: {_message(body)}")
        if status in (400, 413, 422) and code in _UNREAD:
            raise Unread(message)
        if status in (401, 403):
            variable = self.key_variable
            cure = f"check the key in {variable}" if variable else "name its environment variable as key_variable"
            raise InputError(f"the endpoint refuses the key ({message}): {cure}")
        if status == 404:
            raise InputError(f"the endpoint knows no such model or address ({message}): check model and base_url")
        if code == "insufficient_quota":
            raise InputError(f"the endpoint's account has no credit left ({message}): top it up, then run again")
        if status in (400, 422) and "logprob" in message.lower():
            raise no_logprobs(message)
        raise Unanswered(message)


def no_logprobs(what: str) -> InputError:
    """The error for an endpoint that gives no token probabilities."""
    return InputError(
        f"the endpoint lacks logprobs with top_logprobs ({what}): "
        "use one that gives them, or ask for sampling (samples=20)"
    )


def _estimate(request: Any) -> int:
    """Tokens of one call: the prompt's by estimate, the reply's at most."""
    body = json.loads(request.content)
    return estimate_tokens(body["messages"]) + int(body["max_tokens"])


def _error(body: object) -> object:
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except json.JSONDecodeError:
            return body
    return body.get("error", body) if isinstance(body, dict) else body


def _code(body: object) -> str:
    error = _error(body)
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


def _message(body: object) -> str:
    """One line of an error's text, cut to a readable length."""
    error = _error(body)
    text = str(error.get("message") or error) if isinstance(error, dict) else str(error or "no text")
    return " ".join(text.split())[:_LONGEST_MESSAGE]


A = TypeVar("A")
R = TypeVar("R")


def in_threads(work: Callable[[A], R], items: Sequence[A], concurrency: int) -> Generator[tuple[int, R], None, None]:
    """Results with their items' places, in the order in which they come.

    The first error ends it: what has not begun is dropped, what is under way is still yielded, then the error is
    raised. Closing the generator drops what has not begun and waits for the rest.
    """
    ended = threading.Event()

    def one(item: A) -> tuple[R] | None:
        if ended.is_set():
            return None
        try:
            return (work(item),)
        except BaseException:
            ended.set()
            raise

    pool = ThreadPoolExecutor(concurrency)
    errors = []
    try:
        places = {pool.submit(one, item): place for place, item in enumerate(items)}
        for future in as_completed(places):
            if (error := future.exception()) is not None:
                errors.append(error)
            elif (result := future.result()) is not None:
                yield places[future], result[0]
    finally:
        ended.set()
        pool.shutdown(cancel_futures=True)
    if errors:
        raise errors[0]
