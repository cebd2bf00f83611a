"""Chat completions from any endpoint that speaks OpenAI's format: key, budget, requests, and what errors mean."""

import importlib.util
import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from persona_probe.data.chat import Message
from persona_probe.errors import InputError
from persona_probe.evaluate.completion import (
    Completion,
    Malformed,
    error_code,
    error_message,
    error_of,
    read_body,
)

log = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
_MASK = "***"
_SHORTEST_SECRET = 8
"""A shorter key protects nothing, and its letters are in ordinary words and scores."""


class Key:
    """An endpoint's key, read from the environment. Only `value` holds its text: no repr and no message shows it."""

    def __init__(self, value: str) -> None:
        self.value = value

    @classmethod
    def from_environment(cls, variable: str | None) -> "Key":
        """The key in an environment variable; None is for endpoints that need none.

        Raises:
            InputError: the variable is not set, or holds what no header can carry.
        """
        if variable is None:
            return cls("")
        value = os.environ.get(variable, "").strip()
        if not value:
            raise InputError(f"no key in the environment: set {variable}, or name another variable as key_variable")
        if not (value.isascii() and value.isprintable() and " " not in value):
            raise InputError(
                f"the key in {variable} holds a space, a line break or a letter beyond ASCII: copy it again"
            )
        return cls(value)

    def masked(self, text: str) -> str:
        """`text` without the key: endpoints repeat it in error messages and replies.

        A key such as `1` or `none`, which local servers take, is no secret and stays.
        """
        return text.replace(self.value, _MASK) if len(self.value) >= _SHORTEST_SECRET else text

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


# --- The client: requests in threads, retried by the openai client itself

_FAULT, _COMPLETION = "persona_probe.fault", "persona_probe.completion"
"""Extensions that a response gets here: what is wrong with its body, or what is in it."""
_UNREAD = ("content_filter", "context_length_exceeded")
"""Error codes that concern one request: a content filter, or a prompt that is too long."""
_SMALLEST_LIMIT, _BYTES_OF_TOKEN = 1 << 20, 64
"""Bytes that a reply may have: this many, and this many for each token that was asked for."""
_WHOLE_IN = 5
"""A reply must be whole within this many timeouts of its first byte."""
_LIMITS = ("max_completion_tokens", "max_tokens")
_OPTIONAL = ("temperature", "top_p", "seed")
"""Parameters that some models refuse: reasoning models take no temperature but their own."""
_REFUSES = re.compile(r"unsupported|not support|unrecogni[sz]ed|unknown|not permitted|not allowed|only the default")


class Unanswered(Exception):
    """One request got no answer, after all retries. Others may succeed."""


class Unreadable(Unanswered):
    """A reply came whole and cannot be read. Asking again would be paid twice."""


class Unread(Unanswered):
    """The endpoint does not read this prompt: a content filter, or too long."""


class Refused(InputError):
    """The endpoint refuses the key, the model or the account: it is likely to refuse every request."""


class ChatClient:
    """Chat completions of one endpoint, for any number of threads.

    The `openai` client retries what may pass: 408, 409, 429, 5xx, lost connections, and here also bodies that hold no
    completion. It waits as long as Retry-After asks. A reply is read as a stream and given up where it is longer than
    any that was asked for. Redirects are not followed. A model that refuses `max_tokens` is sent
    `max_completion_tokens`, and one that refuses a temperature, `top_p` or a seed is asked without; this is learned
    from its first error, and said once.

    Args:
        base_url: where the endpoint is, such as `http://127.0.0.1:8000/v1`.
        key_variable: environment variable that holds the key; None sends none, for local servers.
        max_retries: how often a request is sent again.
        timeout: seconds without a byte from the endpoint; the body of a reply may take five times as long.
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
        self._refused: set[str] = set()
        """Parameters that the model does not take."""
        from openai import DefaultHttpxClient, OpenAI

        hooks: Any = {"request": [self._before], "response": [self._after]}
        self._openai = OpenAI(
            base_url=base_url,
            api_key=self.key.value or "none",
            max_retries=max_retries,
            timeout=timeout,
            # One request a connection: on a kept one, a reply that nobody asked for would be the next answer's.
            default_headers={"Accept-Encoding": "identity", "Connection": "close"},
            http_client=DefaultHttpxClient(event_hooks=hooks, follow_redirects=False),
        )

    @property
    def address(self) -> str:
        """Where the endpoint is, without a user name or password that its address may hold."""
        place = urlsplit(str(self._openai.base_url))
        return f"{place.scheme}://{place.netloc.rpartition('@')[2]}{place.path}"

    def complete(self, thought: int = 0, **request: Any) -> Completion:
        """Send one request, with retries.

        Args:
            thought: tokens to add to the limit of a model that takes only `max_completion_tokens`, which counts its
                thought too.
            request: the body: model, messages, max_tokens and further decoding parameters.

        Raises:
            InputError: no request can succeed, and what to change.
            Unanswered: this one got no answer, whatever the reason.
            BudgetSpent: the budget does not allow it.
        """
        while True:
            known = frozenset(self._refused)
            try:
                return self._send(_fitted(request, known, thought))
            except _Parameter as error:
                if error.name in known:
                    raise Unanswered(str(error)) from None
                self._learn(error)

    def _learn(self, error: "_Parameter") -> None:
        """Remember a parameter that the model refuses; several threads may hear of it at once."""
        if error.name not in self._refused:
            self._refused.add(error.name)
            instead = "max_completion_tokens is sent" if error.name == "max_tokens" else "it is left out"
            log.warning("%s takes no %s: %s (%s)", self.address, error.name, instead, error)

    def _send(self, request: dict[str, Any]) -> Completion:
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        try:
            response = self._openai.chat.completions.with_raw_response.create(**request)
            return response.http_response.extensions[_COMPLETION]
        except APIStatusError as error:
            if (fault := error.response.extensions.get(_FAULT)) is not None:
                raise (Unanswered if fault.again else Unreadable)(self._shown(str(fault))) from None
            self._refuse(error.status_code, error.body or error.response.text, request)
        except APITimeoutError:
            self._give_up(f"no reply within {self.timeout:g} s: raise timeout or lower concurrency")
        except APIConnectionError as error:
            self._give_up(f"connection refused or cut off ({error.__cause__ or error}): check base_url")
        except Exception as error:  # whatever a library makes of a reply, it is the failure of one request
            self._give_up(f"a reply that cannot be read ({type(error).__name__}: {error})")

    def _before(self, request: Any) -> None:
        """Called before every attempt."""
        attempt = 1 + int(request.headers.get("x-stainless-retry-count", 0))
        if attempt > 1:
            log.warning("%s: attempt %d follows a fault that may pass", self.address, attempt)
        self.budget.reserve(sum(_estimates(request)))

    def _after(self, response: Any) -> None:
        """Called after every attempt: read it, count what it took, and mark what the client must retry, or must not."""
        prompt, reply = _estimates(response.request)
        try:
            body = read_body(response, _SMALLEST_LIMIT + _BYTES_OF_TOKEN * reply, self.timeout * _WHOLE_IN)
        except Malformed as fault:
            _mark(response, fault)
            return
        if 300 <= response.status_code < 400:
            response.headers.pop("location", None)
            self.budget.settle(prompt + reply, 0)
            cure = "base_url is another address than the endpoint's: check it"
            _mark(response, Malformed(f"HTTP {response.status_code}: a redirect, which is not followed; {cure}", True))
            return
        if response.status_code >= 400:
            self.budget.settle(prompt + reply, 0)
            if error_code(body) == "insufficient_quota":
                response.headers["x-should-retry"] = "false"
            return
        try:
            completion = Completion.of(body, self.key.masked)
        except Malformed as fault:
            _mark(response, fault)
            return
        counts = (completion.prompt_tokens, prompt), (completion.completion_tokens, reply)
        self.budget.settle(prompt + reply, sum(estimate if count is None else count for count, estimate in counts))
        response.extensions[_COMPLETION] = completion

    def _give_up(self, message: str) -> NoReturn:
        raise Unanswered(self._shown(message))

    def _shown(self, message: str) -> str:
        """A message of the endpoint's as it may be printed: on one line, without the key and control characters."""
        return "".join(c if c.isprintable() else "?" for c in " ".join(self.key.masked(message).split()))

    def _refuse(self, status: int, body: object, request: Mapping[str, Any]) -> NoReturn:
        """Raise what an HTTP error means."""
        code, message = error_code(body), self._shown(f"HTTP {status}: {error_message(body)}")
        if status in (400, 413, 422) and code in _UNREAD:
            raise Unread(message)
        if status == 401 or (status == 403 and isinstance(error_of(body), dict)):  # else a firewall's page
            variable = self.key_variable
            cure = f"check the key in {variable}" if variable else "name its environment variable as key_variable"
            raise Refused(f"the endpoint refuses the key ({message}): {cure}")
        if status == 404:
            raise Refused(f"the endpoint knows no such model or address ({message}): check model and base_url")
        if code == "insufficient_quota":
            raise Refused(f"the endpoint's account has no credit left ({message}): top it up, then run again")
        if status in (400, 422):
            if "logprob" in message.lower():
                raise no_logprobs(message)
            if (name := _refused_parameter(body, message, request)) is not None:
                raise _Parameter(name, message)
        raise Unanswered(message)


class _Parameter(Exception):
    """The model does not take a parameter."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def _refused_parameter(body: object, message: str, request: Mapping[str, Any]) -> str | None:
    """The parameter that an error is about, if the model refuses it whatever its value."""
    error = error_of(body)
    named = error.get("param") if isinstance(error, dict) else None
    if not _REFUSES.search(message.lower()) and not (named and "unsupported" in error_code(body)):
        return None
    names = [name for name in ("max_tokens", *_OPTIONAL) if name in request]
    return named if named in names else next((name for name in names if name in message), None)


def _fitted(request: Mapping[str, Any], refused: frozenset[str], thought: int) -> dict[str, Any]:
    """A request without the parameters that the model refuses."""
    kept = {name: value for name, value in request.items() if name not in refused}
    if "max_tokens" in refused:
        kept["max_completion_tokens"] = request["max_tokens"] + thought
    return kept


def no_logprobs(what: str) -> Refused:
    """The error for an endpoint that gives no token probabilities."""
    return Refused(
        f"the endpoint lacks logprobs with top_logprobs ({what}): "
        "use one that gives them, or ask for sampling (samples=20)"
    )


def _mark(response: Any, fault: Malformed) -> None:
    """Make a response one that the client retries, or that it hands on as an error."""
    response.status_code = 502
    response.extensions[_FAULT] = fault
    response.headers["x-should-retry"] = "true" if fault.again else "false"


def _estimates(request: Any) -> tuple[int, int]:
    """Tokens of one call: the prompt's by estimate, the reply's at most."""
    body = json.loads(request.content)
    return estimate_tokens(body["messages"]), int(next(body[name] for name in _LIMITS if name in body))


A = TypeVar("A")
R = TypeVar("R")


class NoMore(Exception):
    """Thrown into `in_threads`: nothing more shall begin, and what is under way is still handed over."""


def in_threads(work: Callable[[A], R], items: Sequence[A], concurrency: int) -> Generator[tuple[int, R], None, None]:
    """Results with their items' places, in the order in which they come.

    The first error, an interrupt or `NoMore` ends it: what has not begun is dropped, what is under way is still
    yielded, for it is paid; then the error is raised. Closing the generator drops both and waits.
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
    errors: list[BaseException] = []
    try:
        places = {pool.submit(one, item): place for place, item in enumerate(items)}
        for future in _as_done(places, ended, errors):
            if (error := future.exception()) is not None:
                errors.append(error)
            elif (result := future.result()) is not None:
                try:
                    yield places[future], result[0]
                except NoMore:
                    ended.set()
    finally:
        ended.set()
        pool.shutdown(cancel_futures=True)
    if errors:
        raise errors[0]


def _as_done(
    futures: Collection[Future[R]], ended: threading.Event, errors: list[BaseException]
) -> Generator[Future[R], None, None]:
    """Futures in the order in which they end; a first interrupt is noted and ends what has not begun."""
    done: SimpleQueue[Future[R]] = SimpleQueue()
    for future in futures:
        future.add_done_callback(done.put)
    left = len(futures)
    while left:
        try:
            future = done.get()
        except KeyboardInterrupt as error:
            if errors:
                raise
            ended.set()
            errors.append(error)
            continue
        left -= 1
        yield future
