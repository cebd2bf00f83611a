"""Judges behind an OpenAI-compatible chat-completions endpoint (extra `judges`)."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import urlsplit

from persona_probe.errors import InputError
from persona_probe.evaluate.completion import Malformed
from persona_probe.evaluate.endpoint import (
    OPENAI,
    Budget,
    BudgetSpent,
    ChatClient,
    Refused,
    Unanswered,
    Unread,
    Unreadable,
    estimate_tokens,
    in_threads,
    no_logprobs,
)
from persona_probe.evaluate.judges.replies import (
    Ask,
    Failure,
    Filtered,
    NoLogprobs,
    Replies,
    Reply,
    reply_of,
    reply_word,
)

_TOP_LOGPROBS = 20
_SAMPLED_TOKENS = 8
"""Length of a sampled reply: enough for a number or a label, however the model splits them."""
_THOUGHT_TOKENS = 2048
"""What a model that takes only `max_completion_tokens`, a reasoning model, may think before a written reply."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind a chat-completions endpoint.

    Raises:
        InputError: a value out of range, or a URL that may hold a key.
    """

    model: str
    base_url: str = OPENAI
    key_variable: str | None = "OPENAI_API_KEY"
    """Environment variable with the key; None for an endpoint that needs none."""
    concurrency: int = 8
    """Requests under way at the same time."""
    timeout: float = 60.0
    """Seconds without a byte from the endpoint."""
    samples: int = 0
    """0: one token by its probabilities. More: sample this many short replies and take their shares, for an endpoint
    that gives no probabilities or a model that writes numbers digit by digit. It costs that many calls per answer."""
    max_retries: int = 5
    """How often a request is sent again after a fault that may pass."""
    thought_tokens: int = 0
    """Tokens that a judge which thinks first may write before a sampled or a written reply."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
        except ValueError as error:
            raise InputError(f"base_url is no web address ({error}): give one such as {OPENAI}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("base_url is no web address: give one such as https://api.openai.com/v1")
        if parts.username or parts.password or parts.query:
            raise InputError("base_url holds a user, a password or a query: put the key into an environment variable")
        counts = self.samples, self.max_retries, self.thought_tokens
        if self.concurrency < 1 or not self.timeout > 0 or min(counts) < 0:
            raise InputError(
                "an endpoint needs concurrency of 1 or more, a timeout above 0, and samples, max_retries and "
                "thought_tokens of 0 or more"
            )

    @property
    def id(self) -> str:
        """Model, address and decoding parameters, as canonical JSON."""
        place = {"backend": "http", "base_url": self.base_url.rstrip("/"), "model": self.model}
        # "read" tells replies from those that an earlier version kept by their first number alone.
        short = {**self.decoding(0), "samples": self.samples, "read": 2} if self.samples else self.decoding(0)
        return json.dumps(place | {"decoding": short}, sort_keys=True)

    def decoding(self, seed: int, written: int = 0) -> dict[str, object]:
        """Decoding parameters of one call; `written` is the length of a written reply, 0 for a score."""
        if written:
            return {"temperature": 0, "max_tokens": written + self.thought_tokens, "seed": seed}
        if self.samples:
            return {"temperature": 1, "max_tokens": _SAMPLED_TOKENS + self.thought_tokens, "seed": seed}
        return {"temperature": 0, "max_tokens": 1, "seed": seed, "logprobs": True, "top_logprobs": _TOP_LOGPROBS}


class HttpBackend:
    """Asks an endpoint, several requests at a time, with retries and a budget.

    Raises:
        InputError: the key is not in the environment, or the extra is not installed.
    """

    def __init__(self, endpoint: Endpoint, budget: Budget | None = None) -> None:
        self.endpoint = endpoint
        self.client = ChatClient(
            endpoint.base_url, endpoint.key_variable, endpoint.max_retries, endpoint.timeout, budget
        )

    @property
    def id(self) -> str:
        """See `Endpoint.id`."""
        return self.endpoint.id

    @property
    def block(self) -> int:
        """Enough that few threads wait for a block's last request."""
        return 8 * self.endpoint.concurrency

    def cost(self, ask: Ask) -> tuple[int, int, int]:
        """Calls, prompt tokens (by estimate) and reply tokens (at most) of one answer, without retries."""
        calls = self._calls(ask)
        reply = int(str(self.endpoint.decoding(0, ask.written)["max_tokens"]))
        return calls, calls * estimate_tokens(ask.messages), calls * reply

    def replies(self, asks: Sequence[Ask]) -> Replies:
        """See `Backend.replies`.

        Raises:
            InputError: nothing; what an endpoint refuses is a `Failure` that says so.
        """
        try:
            with closing(in_threads(self._outcome, asks, self.endpoint.concurrency)) as outcomes:
                yield from outcomes
        except BudgetSpent:
            return

    def _outcome(self, ask: Ask) -> Reply | Failure:
        """What became of one request, of several samples if the judge samples: half of them are enough."""
        calls = self._calls(ask)
        replies: list[Reply] = []
        failed = 0
        for seed in range(calls):
            try:
                outcome = self._checked(ask, seed)
            except BudgetSpent:
                if 2 * len(replies) < calls:
                    raise
                break
            if isinstance(outcome, Reply):
                replies.append(outcome)
                continue
            failed += 1
            if outcome.refused or 2 * failed > calls:
                return outcome
        return replies[0] if self._by_logprobs(ask) or ask.written else sampled_reply(replies)

    def _checked(self, ask: Ask, seed: int) -> Reply | Failure:
        """One reply. Whatever goes wrong with it concerns it alone."""
        try:
            return self._reply(ask, seed)
        except (Unread, Filtered):
            return Reply(filtered=True)
        except Refused as error:
            return Failure(f"{self.endpoint.model} at {self.endpoint.base_url}: {error}", refused=True)
        except NoLogprobs:
            return Failure(str(no_logprobs("a reply came without them")))
        except Malformed as error:
            return Failure(str(error), came=True)
        except Unanswered as error:
            return Failure(str(error), came=isinstance(error, Unreadable))
        except Exception as error:
            return Failure(self.client.key.masked(f"{type(error).__name__}: {error}"))

    def _reply(self, ask: Ask, seed: int) -> Reply:
        decoding, by_logprobs = self.endpoint.decoding(seed, ask.written), self._by_logprobs(ask)
        thought = 0 if by_logprobs else max(0, _THOUGHT_TOKENS - self.endpoint.thought_tokens)
        messages = list(ask.messages)
        completion = self.client.complete(thought, model=self.endpoint.model, messages=messages, **decoding)
        return reply_of(completion, logprobs=by_logprobs)

    def _by_logprobs(self, ask: Ask) -> bool:
        return not ask.written and not self.endpoint.samples

    def _calls(self, ask: Ask) -> int:
        return 1 if ask.written else max(self.endpoint.samples, 1)


def sampled_reply(replies: Sequence[Reply]) -> Reply:
    """Several replies as one: the share of each number or first word (`reply_word`) stands for its probability."""
    words = Counter(reply_word(reply.text) for reply in replies)
    return Reply(
        {word: count / len(replies) for word, count in words.items()},
        prompt_tokens=sum(r.prompt_tokens for r in replies),
        completion_tokens=sum(r.completion_tokens for r in replies),
        filtered=any(r.filtered for r in replies),
    )
