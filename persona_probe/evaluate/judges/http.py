"""Judges behind an OpenAI-compatible chat-completions endpoint (extra `judges`)."""

import asyncio
import importlib.util
import json
import logging
import os
import queue
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import anyio.from_thread

from persona_probe.errors import InputError
from persona_probe.evaluate.judges.replies import (
    Ask,
    Budget,
    BudgetSpent,
    Failure,
    Malformed,
    NoLogprobs,
    Replies,
    Reply,
    estimate_tokens,
    parse_completion,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI

# --- When a request is sent again, and after how long

T = TypeVar("T")


@dataclass(frozen=True)
class Retry:
    """How often and how patiently a request is sent again.

    Raises:
        InputError: no attempt, or a wait below zero.
    """

    attempts: int = 6
    first_wait: float = 1.0
    """Seconds; doubled at each further attempt, with random jitter on top."""
    longest_wait: float = 60.0
    """Seconds. An endpoint that asks for more (Retry-After) is not waited for."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_wait < 0 or self.longest_wait < 0:
            raise InputError("retries need at least one attempt and waits of zero or more seconds")

    def wait(self, attempt: int, retry_after: float | None) -> float:
        """Seconds before the attempt after number `attempt` (from 1): never less than the endpoint asked for."""
        jitter = random.uniform(0, self.first_wait)
        if retry_after is not None:
            return retry_after + jitter
        return min(self.first_wait * 2 ** (attempt - 1), self.longest_wait) + jitter


class Retryable(Exception):
    """A fault that may pass."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that an endpoint asks to wait: `retry-after-ms`, or `Retry-After` in seconds or as a date."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return max(milliseconds / 1000, 0.0)
    text = headers.get("retry-after")
    if text is None or (seconds := _number(text)) is not None:
        return None if text is None else max(seconds or 0.0, 0.0)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    now = now or datetime.now(UTC)
    return max((date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds(), 0.0)


async def with_retries(retry: Retry, request: Callable[[], Awaitable[T]], tell: Callable[[str, int, float], None]) -> T:
    """Await a request, again after `Retryable` faults; raises the last one when no attempt is left.

    Args:
        tell: called before each wait with the fault, the next attempt's number and the seconds.
    """
    from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

    def worth_waiting(error: BaseException) -> bool:
        return isinstance(error, Retryable) and (error.retry_after or 0.0) <= retry.longest_wait

    def fault(state: RetryCallState) -> BaseException | None:
        return state.outcome.exception() if state.outcome else None

    def wait(state: RetryCallState) -> float:
        error = fault(state)
        return retry.wait(state.attempt_number, error.retry_after if isinstance(error, Retryable) else None)

    def before(state: RetryCallState) -> None:
        tell(str(fault(state)), state.attempt_number + 1, state.upcoming_sleep)

    async def once() -> T:
        return await request()

    attempts = AsyncRetrying(
        stop=stop_after_attempt(retry.attempts),
        wait=wait,
        retry=retry_if_exception(worth_waiting),
        before_sleep=before,
        reraise=True,
    )
    return await attempts(once)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


# --- Which model an HTTP judge asks, where and how

TOP_LOGPROBS = 20
SAMPLED_TOKENS = 8
"""Length of a sampled reply: enough for a number or a label, however the model splits them."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind a chat-completions endpoint.

    Raises:
        InputError: a value out of range, or a URL that may hold a key.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    key_variable: str | None = "OPENAI_API_KEY"
    """Environment variable with the key; None for an endpoint that wants none."""
    concurrency: int = 8
    """Requests under way at the same time."""
    timeout: float = 60.0
    """Seconds for one request, from sending it to its last byte."""
    samples: int = 0
    """0: one token by its probabilities. More: sample so many short replies and take their shares, for an endpoint that
    gives no probabilities or a model that writes numbers digit by digit. It costs that many calls an answer."""
    retry: Retry = field(default_factory=Retry)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("base_url is no web address: give one such as https://api.openai.com/v1")
        if parts.username or parts.password or parts.query:
            raise InputError("base_url holds a user, a password or a query: put the key into an environment variable")
        if self.concurrency < 1 or self.timeout <= 0 or self.samples < 0:
            raise InputError("an endpoint needs concurrency of 1 or more, a timeout above 0 and samples of 0 or more")

    @property
    def id(self) -> str:
        """Model, address and decoding parameters, as canonical JSON."""
        place = {"backend": "http", "base_url": self.base_url.rstrip("/"), "model": self.model}
        short = {**self.decoding(0), "samples": self.samples} if self.samples else self.decoding(0)
        return json.dumps(place | {"decoding": short}, sort_keys=True)

    def decoding(self, seed: int, written: int = 0) -> dict[str, object]:
        """Decoding parameters of one call; `written` is the length of a written reply, 0 for a score."""
        if written:
            return {"temperature": 0, "max_tokens": written, "seed": seed}
        if self.samples:
            return {"temperature": 1, "max_tokens": SAMPLED_TOKENS, "seed": seed}
        return {"temperature": 0, "max_tokens": 1, "seed": seed, "logprobs": True, "top_logprobs": TOP_LOGPROBS}


# --- A secret that does not show itself

MASK = "***"


class Key:
    """An endpoint's key, read from the environment. Its text is in `value` alone, never in a repr or a message."""

    def __init__(self, value: str) -> None:
        self.value = value

    @classmethod
    def from_environment(cls, variable: str | None) -> "Key":
        """The key in an environment variable; None is for endpoints that want none.

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
        return text.replace(self.value, MASK) if self.value else text

    def __repr__(self) -> str:
        return f"Key({MASK})"


# --- Probabilities from sampled replies, for endpoints that give none

FIRST_WORD = re.compile(r"[+-]?\d+|[A-Za-z]+")


def sampled_reply(replies: Sequence[Reply]) -> Reply:
    """Several replies as one: the share of each first number or word stands for its probability."""
    words = Counter(_first_word(reply.text) for reply in replies)
    return Reply(
        {word: count / len(replies) for word, count in words.items()},
        prompt_tokens=sum(r.prompt_tokens for r in replies),
        completion_tokens=sum(r.completion_tokens for r in replies),
        filtered=any(r.filtered for r in replies),
    )


def _first_word(text: str) -> str:
    found = FIRST_WORD.search(text)
    return found[0] if found else ""


# --- What an endpoint's HTTP error means: worth another try, this answer only, or the end of the run

LONGEST_MESSAGE = 200
UNREAD = ("content_filter", "context_length_exceeded")
"""Error codes that concern one answer: a content filter, or a prompt that is too long."""
PASSING = (408, 409, 425, 429)


class Refused(Exception):
    """The endpoint turned one request down; others may succeed."""


def status_reply(status: int, headers: Mapping[str, str], body: object, *, key_variable: str | None) -> Reply:
    """The reply that an HTTP error stands for: a filtered answer. All other errors are raised.

    Args:
        body: the error's decoded JSON, or its text.

    Raises:
        Retryable: a fault that may pass, with the wait that the endpoint asks for.
        Refused: this request only.
        InputError: no request can succeed.
    """
    code, message = _code(body), f"HTTP {status}: {_message(body)}"
    if status in (400, 413, 422) and code in UNREAD:
        return Reply(filtered=True)
    if status in (401, 403):
        where = f"check the key in {key_variable}" if key_variable else "name the key's variable as key_variable"
        raise InputError(f"the endpoint refuses the key ({message}): {where}")
    if status == 404:
        raise InputError(f"the endpoint knows no such model or address ({message}): check model and base_url")
    if status == 429 and code == "insufficient_quota":
        raise InputError(f"the endpoint's account has no credit left ({message}): top it up, then run again")
    if status in (400, 422) and "logprob" in message.lower():
        raise no_logprobs(message)
    if status in PASSING or status >= 500:
        raise Retryable(message, retry_after(headers))
    raise Refused(message)


def no_logprobs(what: str) -> InputError:
    """The error for an endpoint that gives no token probabilities."""
    return InputError(
        f"the endpoint lacks logprobs with top_logprobs ({what}): "
        "use one that gives them, or ask for sampling (samples=20)"
    )


def _error(body: object) -> object:
    return body.get("error", body) if isinstance(body, dict) else body


def _code(body: object) -> str:
    error = _error(body)
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


def _message(body: object) -> str:
    """One line of an error's text, cut to a readable length."""
    error = _error(body)
    text = str(error.get("message") or error) if isinstance(error, dict) else str(error or "no text")
    return " ".join(text.split())[:LONGEST_MESSAGE]


log = logging.getLogger(__name__)

Outcome = Reply | Failure | InputError
Pending = Generator[tuple[int, Ask], None, None]
Put = Callable[[tuple[int, Outcome]], None]


class HttpBackend:
    """Asks an endpoint, several requests at a time, with retries and a budget.

    Raises:
        InputError: the key is not in the environment, or the extra is not installed.
    """

    def __init__(self, endpoint: Endpoint, budget: Budget | None = None) -> None:
        if any(importlib.util.find_spec(name) is None for name in ("openai", "tenacity")):
            raise InputError("judges over HTTP need the extra `judges`: pip install 'persona-probe[judges]'")
        self.endpoint, self.budget = endpoint, budget or Budget()
        self.key = Key.from_environment(endpoint.key_variable)

    @property
    def id(self) -> str:
        """See `Endpoint.id`."""
        return self.endpoint.id

    @property
    def block(self) -> int:
        """Enough that few workers wait for a block's last request."""
        return 8 * self.endpoint.concurrency

    def cost(self, ask: Ask) -> tuple[int, int, int]:
        """Calls, prompt tokens (by estimate) and reply tokens (at most) of one answer, without retries."""
        calls = 1 if ask.written else max(self.endpoint.samples, 1)
        prompt, reply = self._tokens(ask)
        return calls, calls * prompt, calls * reply

    def replies(self, asks: Sequence[Ask]) -> Replies:
        """See `Backend.replies`.

        Raises:
            InputError: the key or the model is refused, or the endpoint gives no probabilities.
        """
        with closing(stream(self._serve, asks)) as outcomes:
            for index, outcome in outcomes:
                if isinstance(outcome, InputError):
                    raise InputError(f"{self.endpoint.model} at {self.endpoint.base_url}: {outcome}")
                yield index, outcome

    async def _serve(self, asks: Sequence[Ask], put: Put) -> None:
        from openai import AsyncOpenAI

        pending = (pair for pair in enumerate(asks))
        client = AsyncOpenAI(
            api_key=self.key.value or "none",
            base_url=self.endpoint.base_url,
            timeout=self.endpoint.timeout,
            max_retries=0,
        )
        async with client, asyncio.TaskGroup() as group:
            for _ in range(min(self.endpoint.concurrency, len(asks))):
                group.create_task(self._work(client, pending, put))

    async def _work(self, client: "AsyncOpenAI", pending: Pending, put: Put) -> None:
        """Take requests from those pending until none is left; closing them ends all workers after their own."""
        for index, ask in pending:
            try:
                put((index, await self._reply(client, ask)))
            except BudgetSpent:
                pending.close()
            except (Retryable, Refused) as error:
                put((index, Failure(self.key.masked(str(error)))))
            except InputError as error:
                put((index, InputError(self.key.masked(str(error)))))
                pending.close()

    async def _reply(self, client: "AsyncOpenAI", ask: Ask) -> Reply:
        seeds = range(1 if ask.written else max(self.endpoint.samples, 1))
        replies = [
            await with_retries(self.endpoint.retry, lambda seed=seed: self._attempt(client, ask, seed), self._tell)
            for seed in seeds
        ]
        return replies[0] if self._by_logprobs(ask) or ask.written else sampled_reply(replies)

    async def _attempt(self, client: "AsyncOpenAI", ask: Ask, seed: int) -> Reply:
        """One call. It counts in full where the endpoint may have worked on it, not at all where it was turned away."""
        from openai import APIStatusError

        estimate = sum(self._tokens(ask))
        self.budget.reserve(estimate)
        try:
            reply = await self._call(client, ask, seed)
        except APIStatusError as error:
            self.budget.settle(estimate, 0)
            headers, body = error.response.headers, error.body or error.response.text
            return status_reply(error.status_code, headers, body, key_variable=self.endpoint.key_variable)
        self.budget.settle(estimate, reply.prompt_tokens + reply.completion_tokens or estimate)
        return reply

    async def _call(self, client: "AsyncOpenAI", ask: Ask, seed: int) -> Reply:
        from openai import APIConnectionError, APITimeoutError

        request: dict[str, Any] = {"model": self.endpoint.model, "messages": list(ask.messages)}
        request |= self.endpoint.decoding(seed, ask.written)
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                response = await client.chat.completions.with_raw_response.create(**request)
            return parse_completion(self.key.masked(response.http_response.text), logprobs=self._by_logprobs(ask))
        except (APITimeoutError, TimeoutError):
            raise Retryable(f"no reply within {self.endpoint.timeout:g} s") from None
        except APIConnectionError as error:
            raise Retryable(f"connection refused or cut off ({error.__cause__ or error})") from None
        except Malformed as error:
            raise Retryable(str(error)) from None
        except NoLogprobs:
            raise no_logprobs("a reply came without them") from None

    def _by_logprobs(self, ask: Ask) -> bool:
        return not ask.written and not self.endpoint.samples

    def _tokens(self, ask: Ask) -> tuple[int, int]:
        """Tokens of one call: the prompt's by estimate, the reply's at most."""
        longest = self.endpoint.decoding(0, ask.written)["max_tokens"]
        return estimate_tokens(ask.messages), int(str(longest))

    def _tell(self, error: str, attempt: int, seconds: float) -> None:
        what = self.key.masked(error)
        log.warning("%s: %s; attempt %d follows in %.2f s", self.endpoint.model, what, attempt, seconds)


# --- Results of asynchronous work, one by one, for code that is not asynchronous (a notebook's, too)

A = TypeVar("A")
R = TypeVar("R")


def stream(work: Callable[[A, Callable[[R], None]], Awaitable[None]], argument: A) -> Generator[R, None, None]:
    """Run `work(argument, put)` on an event loop in a thread of its own and yield what it puts, as it comes.

    An error in `work` is raised at the end. Closing it cancels the work and waits for its end.
    """
    results: queue.SimpleQueue[tuple[R, ...]] = queue.SimpleQueue()
    with anyio.from_thread.start_blocking_portal() as portal:
        future = portal.start_task_soon(work, argument, lambda result: results.put((result,)))
        future.add_done_callback(lambda _: results.put(()))
        try:
            while found := results.get():
                yield found[0]
            future.result()
        finally:
            future.cancel()
