"""What a judge takes and gives."""

import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from persona_probe.data.chat import Conversation, Message
from persona_probe.errors import InputError

SCORE = "score"
"""The label of an answer that got a number."""
NO_SCORE = "no score"
"""The judge replied with neither enough weight on numbers nor a label of the protocol."""
FILTERED = "filtered"
"""The endpoint refused to read this answer (a content filter, or a prompt that is too long)."""
FAILED = "failed"
"""No reply came, after all retries."""
NOT_ASKED = "not asked"
"""The budget ended before this answer's turn."""
UNUSABLE = (NO_SCORE, FILTERED, FAILED, NOT_ASKED)
"""Labels that say nothing about the answer. All others (`score`, CODE, REFUSAL...) are verdicts on it."""


@dataclass(frozen=True)
class Item:
    """An answer to be judged."""

    question: str
    answer: str
    id: str = ""
    """The caller's name for it: the same comes back in the judgement."""

    @classmethod
    def of(cls, messages: Conversation, answer: str, id: str = "") -> "Item":
        """An item whose question is a conversation.

        As in the published protocols the judge sees no system prompt. One user turn stands as it is, several turns
        with their roles.
        """
        turns = [m for m in messages if m["role"] != "system"]
        if len(turns) == 1:
            return cls(turns[0]["content"], answer, id)
        return cls("\n\n".join(f"{m['role']}: {m['content']}" for m in turns), answer, id)


@dataclass(frozen=True)
class Judgement:
    """What one judge says of one answer under one protocol."""

    id: str
    """The item's."""
    score: float | None
    """On the protocol's scale; None where it gave none."""
    label: str
    """`score`, a label of the protocol (CODE, REFUSAL...), or one of `UNUSABLE`."""
    mass: float
    """Probability of all numbers of the scale together, from 0 to 1."""
    tokens: dict[str, float]
    """The judge's raw reply: strings and their probabilities (of a written reply, its text and 1)."""
    prompt: Conversation
    """The messages sent."""
    judge: str
    """Model, place and decoding parameters."""
    protocol: str
    scale: tuple[int, int]
    """Lowest and highest score."""
    cached: bool
    """Whether it was in the cache when it was asked for."""
    error: str = ""
    """Why there was no reply."""

    @property
    def usable(self) -> bool:
        """Whether it says anything about the answer."""
        return self.label not in UNUSABLE

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


class Judge(Protocol):
    """Anything that judges answers."""

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement for every item, in order."""
        ...


# --- Requests to a judge and its replies; a chat completion's JSON read with every fault named


@dataclass(frozen=True)
class Ask:
    """One request."""

    messages: tuple[Message, ...]
    numbers: tuple[str, ...]
    """The number strings that count, which a local judge scores one by one."""
    labels: tuple[str, ...] = ()
    written: int = 0
    """0: one token, by its probabilities. Else: written text of at most so many tokens."""


@dataclass(frozen=True)
class Reply:
    """What came back."""

    tokens: dict[str, float] = field(default_factory=dict)
    """Strings and their probabilities."""
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    filtered: bool = False
    """The endpoint refused to read the prompt."""

    def to_json(self) -> str:
        """As one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Reply":
        """What `to_json` wrote."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Failure:
    """No reply came, after all retries."""

    message: str


Replies = Generator[tuple[int, Reply | Failure], None, None]
"""Requests' numbers and what became of them."""


class Backend(Protocol):
    """Where replies come from."""

    @property
    def id(self) -> str:
        """Model, place and decoding parameters: everything but the prompt that decides a reply."""
        ...

    @property
    def block(self) -> int:
        """How many requests it likes to be given together."""
        ...

    def cost(self, ask: Ask) -> tuple[int, int, int]:
        """Calls, prompt tokens (by estimate) and reply tokens (at most) of one request, without retries."""
        ...

    def replies(self, asks: Sequence[Ask]) -> Replies:
        """Replies in any order; those that the budget leaves out do not come. Closing it ends what is under way.

        Raises:
            InputError: no request can succeed (a key that is refused, a model that is not there).
        """
        ...


class Malformed(Exception):
    """A reply that is not a chat completion: worth another try."""


class NoLogprobs(Exception):
    """A chat completion without the probabilities that were asked for."""


def parse_completion(body: str, *, logprobs: bool) -> Reply:
    """A chat completion's JSON.

    Args:
        logprobs: whether the probabilities of the first token are needed.

    Raises:
        Malformed: HTML, cut-off or other JSON.
        NoLogprobs: the endpoint did not give them.
    """
    choice, usage = _choice(_loaded(body))
    text = choice["message"].get("content") or ""
    tokens = _top_tokens(choice) if logprobs else {text: 1.0}
    return Reply(tokens, text, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def _loaded(body: str) -> object:
    try:
        return json.loads(body)
    except json.JSONDecodeError:
        start = body.lstrip()[:15].lower()
        what = "HTML" if start.startswith(("<!doctype", "<html")) else "cut-off or broken JSON"
        raise Malformed(f"{what} in place of a chat completion") from None


def _choice(data: object) -> tuple[dict[str, Any], Mapping[str, Any]]:
    choices = data.get("choices") if isinstance(data, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(data, dict) or not isinstance(first, dict) or not isinstance(first.get("message"), dict):
        raise Malformed("JSON that is no chat completion (no choices with a message)")
    usage = data.get("usage")
    return first, usage if isinstance(usage, dict) else {}


def _top_tokens(choice: Mapping[str, Any]) -> dict[str, float]:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if content is None:
        raise NoLogprobs
    if not content:
        return {}  # a reply of no token: the published code, too, takes it for one without a score
    top = content[0].get("top_logprobs")
    if not top:
        raise NoLogprobs
    try:
        return {str(entry["token"]): math.exp(float(entry["logprob"])) for entry in top}
    except (KeyError, TypeError, ValueError, OverflowError):
        raise Malformed("top_logprobs that hold no token with its logprob") from None


def _count(usage: Mapping[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0


# --- What judging may cost: a limit in calls and tokens, prices, and an estimate before anything is spent

BYTES_PER_TOKEN = 4.0
"""About what English text has; an estimate errs by a tenth or two."""
MESSAGE_TOKENS = 4
"""What a chat format adds to each message."""


class BudgetSpent(Exception):
    """The next call would pass the limit."""


class Budget:
    """A limit in calls and tokens (None: no limit), and what was spent of it.

    Every call sent counts, retries too. Before a call its tokens are set aside by estimate, so that calls under way
    at the same time do not pass the limit together; the endpoint's own count replaces the estimate afterwards.

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

    def reserve(self, tokens: int) -> None:
        """Set one call and its tokens aside.

        Raises:
            BudgetSpent: the limit would be passed.
        """
        if self.most_calls is not None and self.calls + 1 > self.most_calls:
            self.stopped = f"the budget of {self.most_calls} calls is spent"
        elif self.most_tokens is not None and self.tokens + tokens > self.most_tokens:
            self.stopped = f"the budget of {self.most_tokens} tokens is spent ({self.tokens} used)"
        else:
            self.calls, self.tokens, self.stopped = self.calls + 1, self.tokens + tokens, ""
            return
        raise BudgetSpent(self.stopped)

    def settle(self, reserved: int, used: int) -> None:
        """Replace an estimate by what a call took (0 where it was turned away unread)."""
        self.tokens += used - reserved


@dataclass(frozen=True)
class Prices:
    """The user's prices, per million tokens, in any currency."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Plan:
    """What a run would send, before it is sent."""

    answers: int
    cached: int
    """Answers whose judgement is in the cache already: they cost nothing."""
    repeated: int
    """Answers that are the same as another one here: asked once."""
    calls: int
    prompt_tokens: int
    """By estimate."""
    completion_tokens: int
    """At most."""
    cost: float | None
    """By the user's prices; None without them."""

    def __str__(self) -> str:
        cost = "cost unknown (give prices)" if self.cost is None else f"cost about {self.cost:.4g}"
        return (
            f"{self.answers} answers: {self.cached} cached, {self.repeated} repeated, {self.calls} calls, about "
            f"{self.prompt_tokens} prompt tokens and at most {self.completion_tokens} reply tokens, {cost}; "
            "retries are not counted"
        )


def estimate_tokens(messages: Sequence[Message]) -> int:
    """Tokens of a prompt, from its length in bytes."""
    return sum(math.ceil(len(m["content"].encode()) / BYTES_PER_TOKEN) + MESSAGE_TOKENS for m in messages)
