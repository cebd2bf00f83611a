"""Broken text: signs in an answer's own words that it repeats itself, or holds no sentences.

The judge's coherence score was fitted on answers of fine-tuned models. What makes those incoherent is that they are
off topic, or code; hardly any is broken text. A model that is steered too hard breaks its text: it repeats itself,
invents words, or strings words together. These signs see that, and nothing else.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import conversation
from persona_probe.evaluate.answers import answer_batches, answer_logprobs

READ = 600
"""Characters that are looked at: the judge reads about as many."""
_FEWEST = 8
"""Words below which an answer is too short for shares of its words to mean anything."""
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_FUNCTION_WORDS = frozenset(
    """
    a about after all also an and any are as at be because been before but by can could did do does down even for from
    get had has have he her here him his how i if in into is it its just like make may me might more most must my no
    not now of off on once one only or other our out over own same she should so some such than that the their them
    then there these they this those through to too under until up us very was we were what when where which while
    who why will with without would you your i'm it's you're don't can't won't that's isn't let's i'll you'll i've
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Signs:
    """What an answer's text looks like; each is a share from 0 to 1, and higher is worse."""

    repeats: float
    """Of three-word sequences, those that occurred before in the answer."""
    squeezed: float
    """How much smaller zlib makes the text (its first `READ` characters)."""
    unknown: float
    """Of words, those that the reader's tokenizer does not hold as one piece: invented, garbled or foreign ones."""
    bare: float
    """Of words, those that are no function word (the, of, you ...): lists of words without sentences have many."""
    other: float
    """Of characters other than spaces, those that are no letters."""


LIMITS: Mapping[str, float] = {"repeats": 0.2, "squeezed": 0.55, "unknown": 0.2, "bare": 0.95, "other": 0.35}
"""Above these, a text is broken; see docs/offline-judge.md for how they were chosen."""
LEAST_LOGPROB = -5.0
"""Below this mean log-probability (nats per token), the embedded model finds no language in an answer."""
SIGNALS = ("published", "text", "likelihood")
"""What the judge's coherence may rest on; see `OfflineJudge.judge`."""
_FEWEST_KNOWN = 10_000
"""A tokenizer with fewer whole words says nothing about which words are known."""
NAMES: Mapping[str, str] = {
    "repeats": "repeats itself",
    "squeezed": "repeats itself (compresses too well)",
    "unknown": "too many unknown words",
    "bare": "no sentences",
    "other": "hardly any letters",
}


class Vocabulary:
    """The words that a tokenizer holds as one piece, in lower case."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        pieces = (piece.lstrip("Ġ▁").lower() for piece in tokenizer.get_vocab() if piece[:1] in "Ġ▁")
        self.words = frozenset(piece for piece in pieces if piece.isalpha())
        self.large = len(self.words) >= _FEWEST_KNOWN

    def __contains__(self, word: str) -> bool:
        return all(part in self.words or len(part) <= 2 for part in re.split("['’]", word.lower()))


def signs(text: str, vocabulary: Vocabulary) -> Signs:
    """The signs of one answer; shares of words are 0 in an answer of fewer than eight words."""
    head = text.strip()[:READ]
    words = [word.lower() for word in _WORD.findall(head)]
    solid = [c for c in head if not c.isspace()]
    raw = head.encode()
    squeezed = 1 - (len(zlib.compress(raw, 9)) - 8) / len(raw) if len(raw) >= 80 else 0.0
    other = sum(not c.isalpha() for c in solid) / len(solid) if len(solid) >= 20 else 0.0
    if len(words) < _FEWEST:
        return Signs(0.0, max(squeezed, 0.0), 0.0, 0.0, other)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return Signs(
        1 - len(set(triples)) / len(triples),
        max(squeezed, 0.0),
        sum(word not in vocabulary for word in words) / len(words) if vocabulary.large else 0.0,
        sum(word not in _FUNCTION_WORDS for word in words) / len(words),
        other,
    )


def mean_logprobs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, items: Sequence[tuple[str, str]]
) -> Float[np.ndarray, " items"]:
    """How likely the reader itself finds each answer's first `READ` characters (nats per token, 0 is certain)."""
    talks = [conversation(question, answer.strip()[:READ]) for question, answer in items]
    return answer_logprobs(model, answer_batches(tokenizer, talks))


class BrokenText:
    """Looks for broken text in answers, with one model's tokenizer and, where asked, its likelihoods."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Read when it is first needed."""
        return Vocabulary(self.tokenizer)

    def look(self, items: Sequence[tuple[str, str]], *, likelihood: bool = False) -> list[str]:
        """How each answer's text is broken; empty where no sign of it is seen."""
        found = [fault(signs(answer, self.vocabulary)) for _, answer in items]
        if not likelihood:
            return found
        logprobs = mean_logprobs(self.model, self.tokenizer, items)
        unlikely = "no language that the embedded model knows"
        return [one or (unlikely if p < LEAST_LOGPROB else "") for one, p in zip(found, logprobs, strict=True)]


def fault(signs: Signs) -> str:
    """What is wrong by the first sign that is above its limit; empty if none is."""
    return next((NAMES[name] for name, limit in LIMITS.items() if getattr(signs, name) > limit), "")
