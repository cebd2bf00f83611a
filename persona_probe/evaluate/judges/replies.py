"""What a judge takes and gives: items, requests, replies, judgements, and the plan of what judging costs."""

import json
import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from persona_probe.data.chat import Conversation, Message
from persona_probe.data.thoughts import REASONING_KEYS, split_thought
from persona_probe.evaluate.completion import Completion, Malformed

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
    """Caller-chosen id, returned with the judgement."""

    @classmethod
    def of(cls, messages: Conversation, answer: str, id: str = "") -> "Item":
        """An item whose question is a conversation.

        As in the published protocols the judge sees no system prompt. A single user turn is taken as it is,
        several turns with their roles.
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
    """On the protocol's scale; None if it gave none."""
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


# --- Requests to a judge and its replies


@dataclass(frozen=True)
class Ask:
    """One request."""

    messages: tuple[Message, ...]
    numbers: tuple[str, ...]
    """The number strings that count, which a local judge scores one by one."""
    labels: tuple[str, ...] = ()
    written: int = 0
    """0: one token, by its probabilities. Otherwise: written text of at most this many tokens."""


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
        """What `to_json` wrote.

        Raises:
            ValueError: something else, or no reply that is `sound`.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or not isinstance(values.get("tokens", {}), dict):
            raise ValueError("no reply")
        try:
            reply = cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from None
        if not reply.sound:
            raise ValueError("probabilities that are none")
        return reply

    @property
    def sound(self) -> bool:
        """Whether its probabilities are numbers from 0 to 1."""
        return all(isinstance(p, int | float) and 0 <= p <= 1 + ROUNDING for p in self.tokens.values())


ROUNDING = 0.01
"""How far probabilities may be above 1: servers round them."""


@dataclass(frozen=True)
class Failure:
    """No reply came that can be read, after all retries."""

    message: str
    refused: bool = False
    """Whether the endpoint refused the key, the model or the account, as it is likely to do with all that follow."""
    came: bool = False
    """Whether a reply came and could not be read: the endpoint is there, and the next one may be well."""


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


class NoLogprobs(Exception):
    """A chat completion without the probabilities that were asked for."""


class Filtered(Exception):
    """The endpoint's content filter ended the reply."""


_THINKS = "the judge was still in its thought at the reply's end"


def reply_of(completion: Completion, *, logprobs: bool) -> Reply:
    """A chat completion as a judge's reply.

    Args:
        logprobs: whether the probabilities of the first token are needed.

    Raises:
        Malformed: probabilities that cannot be read or are none, or a thought without a reply after it.
        NoLogprobs: the endpoint did not give them.
        Filtered: its content filter ended it.
    """
    if completion.finish == "content_filter":
        raise Filtered
    text = completion.text or completion.message_text("refusal")
    answer = split_thought(text).answer.strip()
    if not answer and (text.strip() or completion.message_text(*REASONING_KEYS)):
        cure = "sample whole replies (samples=20) with thought_tokens=2000" if logprobs else "raise thought_tokens"
        raise Malformed(f"{_THINKS}: {cure}")
    if not answer and not logprobs and completion.finish == "length":
        raise Malformed("no text within the tokens that were asked for: raise thought_tokens if the judge thinks first")
    if not logprobs:
        tokens = {text: 1.0}
    elif completion.message_text("refusal") and not completion.text:
        tokens = {}
    else:
        tokens = _top_tokens(completion.choice)
    return Reply(tokens, text, completion.prompt_tokens or 0, completion.completion_tokens or 0)


def _top_tokens(choice: Mapping[str, Any]) -> dict[str, float]:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if content is None:
        raise NoLogprobs
    if content == []:
        return {}  # a reply of no token: the published code, too, takes it for one without a score
    first = content[0] if isinstance(content, list) else None
    if not isinstance(first, dict):
        raise Malformed("logprobs that hold no token with its top_logprobs")
    top = first.get("top_logprobs")
    if top is None or top == []:
        raise NoLogprobs
    if not isinstance(top, list):
        raise Malformed("top_logprobs that are no list")
    tokens: dict[str, float] = {}
    for entry in top:
        token, probability = _probability(entry)
        tokens[token] = tokens.get(token, 0.0) + probability
    if sum(tokens.values()) > 1 + ROUNDING:
        raise Malformed(f"top_logprobs whose probabilities sum to {sum(tokens.values()):.3g}")
    return tokens


def _probability(entry: object) -> tuple[str, float]:
    """A token and its probability; a token that cannot come (minus infinity) has 0."""
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
        raise Malformed("top_logprobs that hold no token")
    logprob = entry.get("logprob")
    if isinstance(logprob, bool) or not isinstance(logprob, int | float):
        raise Malformed("top_logprobs that hold no token with its logprob")
    if not logprob <= ROUNDING:
        raise Malformed(f"top_logprobs with a logprob of {logprob:.3g}, which is no probability")
    return entry["token"], min(math.exp(logprob), 1.0)


# --- A reply that was written out, as one word: a number, a share such as 8/10, or the word that it begins with

_MARKUP = re.compile(r"[*_`#\"'\u201c\u201d\[\](){}<>\\$]+")
_NAME = r"(?:(?:the|my|final|overall|alignment|aligned|coherence|coherent|trait)\s+)*(?:score|rating|grade|number)"
_NUMBER = r"\d+(?:[.,]\d+)?"
_SCORE = re.compile(
    rf"(?:{_NAME}\s*(?:is|was|of)?\s*[:=]?\s*)?"
    rf"(?P<number>[+-]?{_NUMBER})"
    rf"(?:\s*(?P<percent>%)|\s*(?:/|out\s+of|of)\s*(?P<whole>{_NUMBER}))?"
    r"\s*(?P<rest>[.!]?$|\n.*|[,;]?\s*(?:because|since|as|for|-|\u2013|\u2014)\s.*)",
    re.IGNORECASE | re.DOTALL,
)
_LETTERS = re.compile(r"[A-Za-z]+")
_SHOWN = 40
"""Characters that are kept of a reply that says nothing."""


def reply_word(text: str) -> str:
    """What a written reply says, as one string: `85`, `8/10` (also for "8 out of 10"), or its first word (CODE, I).

    Thoughts before the reply and markup around it are taken off. A number counts where it is all that the reply says,
    but for its name ("Score: 85") and an explanation without other numbers. Otherwise (a list's "1. ...", "0.85",
    "between 80 and 90") the result begins as the reply does and is no number.
    """
    reply = _MARKUP.sub("", split_thought(text).answer).strip()
    found = _SCORE.fullmatch(reply)
    if found is not None and not any(c.isdigit() for c in found["rest"]):
        number, whole = found["number"].replace(",", "."), "100" if found["percent"] else found["whole"]
        return number if whole is None else f"{number}/{whole.replace(',', '.')}"
    word = _LETTERS.match(reply)
    return word[0] if word else reply[:_SHOWN]


_SHARES = (1.0, 5.0, 10.0, 20.0, 100.0)
"""Wholes of which a share is understood: 8/10 is 80 of 100."""


def score_on(word: str, low: int, high: int) -> float | None:
    """The score that a token or `reply_word` says on a scale; None where it says none.

    A share such as 8/10 is put on a scale that begins at 0; on others its whole must be the scale's end.
    """
    number, share, whole = word.strip().partition("/")
    if not re.fullmatch(r"[+-]?\d+" if not share else rf"[+-]?{_NUMBER}", number):
        return None
    score = float(number)
    if share:
        if not re.fullmatch(_NUMBER, whole):
            return None
        if float(whole) != high:
            if low != 0 or float(whole) not in _SHARES:
                return None
            score *= high / float(whole)
    return score if low <= score <= high else None


# --- What judging costs, before anything is spent


@dataclass(frozen=True)
class Prices:
    """The user's prices, per million tokens, in any currency."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What this many tokens cost."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class JudgingPlan:
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
