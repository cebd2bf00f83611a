"""Labels of latents by rule, and how well a label tells held-out passages and tokens: detection and fuzzing.

Definitions are those of Paulo et al., Automatically Interpreting Millions of Features (arXiv 2410.13928), and of its
library delphi: passages of 32 tokens; a passage is activating where the latent is above zero on any of its tokens.
Detection asks of each whether the label fits it. Fuzzing marks tokens in it and asks whether they are the ones on which
the latent fires. The score is the balanced accuracy on passages that the label was not made from.
"""

import heapq
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from zlib import crc32

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from persona_probe.report.cards import LEAST_SCORE, Explanation
from persona_probe.stats import Estimate, jackknife_interval

WINDOW = 32
"""Tokens of a passage."""
KEPT = 160
"""Passages kept of each latent: as many at most on which it fires, and as many on which it is silent."""
ENOUGH = 10
"""Passages of each kind, and questions, that both halves need."""

# --- Passages with a latent's activations, kept in bounded memory whatever the order of the text


@dataclass(frozen=True)
class Window:
    """A passage, and one latent on it."""

    group: int
    """Of the question that it belongs to: passages of one question are on the same side of the split."""
    start: int
    """Its first token's place in the conversation."""
    prompt: int
    """How many tokens of the conversation the prompt has."""
    ids: Int[np.ndarray, " pos"]
    before: int
    """The token before its first one; -1 at the beginning."""
    values: Float[np.ndarray, " pos"]

    @property
    def fires(self) -> bool:
        """Whether the latent is above zero on any of its tokens."""
        return bool((self.values > 0).any())

    @property
    def held_out(self) -> bool:
        """Whether it scores labels; the others make them."""
        return crc32(f"half {self.group}".encode()) % 2 == 1


@dataclass
class Windows:
    """For every latent a random choice of passages, that depends on the text and not on its order."""

    n_latents: int
    _heaps: dict[tuple[int, bool], list[tuple[int, int, int, Window]]] = field(default_factory=dict)

    def add(
        self, number: int, group: int, prompt: int, ids: Int[Tensor, " pos"], values: Float[Tensor, "pos latents"]
    ) -> None:
        """Offer one conversation.

        Args:
            number: its place in the text.
            group: of its question.
            prompt: tokens of its prompt.
        """
        tokens, activations = ids.numpy(), values.numpy()
        for start in range(0, len(tokens), WINDOW):
            part = activations[start : start + WINDOW]
            fires = np.atleast_1d((part > 0).any(axis=0))
            draw = crc32(f"{number} {start}".encode())
            for column in range(self.n_latents):
                heap = self._heaps.setdefault((column, bool(fires[column])), [])
                key = (-draw, -number, -start)  # the largest draw is the first to go
                if len(heap) == KEPT and key <= heap[0][:3]:
                    continue
                before = int(tokens[start - 1]) if start else -1
                span = tokens[start : start + WINDOW].copy()
                window = Window(group, start, prompt, span, before, part[:, column].copy())
                heapq.heappush(heap, (*key, window))
                if len(heap) > KEPT:
                    heapq.heappop(heap)

    def of(self, column: int) -> list[Window]:
        """A latent's passages, those on which it fires first."""
        return [
            window
            for fires in (True, False)
            for *_, window in sorted(self._heaps.get((column, fires), []), key=lambda entry: entry[:3], reverse=True)
        ]


# --- What a rule may look at: the words of passages, padded to one width


class Passages:
    """Passages of one latent with the text of their tokens.

    Args:
        words: the text of a token, by its id.
    """

    def __init__(self, windows: Sequence[Window], words: Callable[[int], str]) -> None:
        self.windows = list(windows)
        self.text = [[words(int(i)) for i in window.ids] for window in windows]
        self.before = [words(window.before) if window.before >= 0 else "" for window in windows]
        self.groups = [window.group for window in windows]
        self.fires: Bool[np.ndarray, " n"] = np.array([window.fires for window in windows], dtype=bool)

    @cached_property
    def real(self) -> Bool[np.ndarray, "n pos"]:
        """Where there are tokens: the last passage of a conversation is shorter."""
        return self.grid(lambda n: [True] * len(self.text[n]))

    @cached_property
    def active(self) -> Bool[np.ndarray, "n pos"]:
        """Tokens on which the latent is above zero."""
        return self.grid(lambda n: (self.windows[n].values > 0).tolist())

    def grid(self, row: Callable[[int], Sequence[bool]]) -> Bool[np.ndarray, "n pos"]:
        """One row of booleans a passage, padded with False."""
        out = np.zeros((len(self.windows), WINDOW), dtype=bool)
        for n in range(len(self.windows)):
            values = row(n)
            out[n, : len(values)] = values
        return out


def word_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """Text of a token in lower case without spaces around it; tokens of white space as they are."""
    known: dict[int, str] = {}

    def word(token: int) -> str:
        if token not in known:
            text = str(tokenizer.decode([token]))
            known[token] = text.strip().lower() or text
        return known[token]

    return word


# --- Rules: each names the tokens on which it expects the latent

START = "the start of a conversation"
"""What stands before the first token."""
MOST_WORDS = 8
CANDIDATES = 60
LEAST_GAIN = 0.005
"""A word that raises the score on the first half by less does not join a rule."""


@dataclass(frozen=True)
class Rule:
    """Expects a latent on certain tokens."""

    kind: str
    """`token` (these words), `after` (the token that follows them), `passage` (from the first of them on), `answer`,
    `question`, or `beginning` (the first passage of a conversation)."""
    words: tuple[str, ...] = ()

    def expects(self, passages: Passages) -> Bool[np.ndarray, "n pos"]:
        """The tokens on which it expects the latent."""
        wanted = set(self.words)
        if self.kind == "token":
            return passages.grid(lambda n: [word in wanted for word in passages.text[n]])
        if self.kind == "after":
            return passages.grid(
                lambda n: [word in wanted for word in (passages.before[n], *passages.text[n])][: len(passages.text[n])]
            )
        if self.kind == "passage":
            hits = passages.grid(lambda n: [word in wanted for word in passages.text[n]])
            return np.logical_or.accumulate(hits, axis=1) & passages.real
        return passages.grid(lambda n: self._by_place(passages.windows[n]))

    def _by_place(self, window: Window) -> list[bool]:
        places = range(window.start, window.start + len(window.ids))
        if self.kind == "beginning":
            return [window.start == 0] * len(window.ids)
        return [(place >= window.prompt) == (self.kind == "answer") for place in places]

    def __str__(self) -> str:
        named = ", ".join(json.dumps(word, ensure_ascii=False) if word else START for word in self.words)
        return {
            "token": f"the token{'s' * (len(self.words) > 1)} {named}",
            "after": f"the token after {named}",
            "passage": f"passages from one of these words on: {named}",
            "answer": "answers",
            "question": "questions",
            "beginning": f"the first {WINDOW} tokens of a conversation",
        }[self.kind]


PLACES = ("answer", "question", "beginning")
LISTS = ("token", "after", "passage")


def fit_rule(passages: Passages) -> Rule:
    """The rule with the best mean of two balanced accuracies, over passages and over tokens."""
    found = [_grow(kind, passages) for kind in LISTS] + [Rule(kind) for kind in PLACES]
    return max(found, key=lambda rule: _fit(rule.expects(passages), passages))


def _fit(expected: Bool[np.ndarray, "n pos"], passages: Passages) -> float:
    by_passage = _balanced(any_of(expected), passages.fires)
    return (by_passage + _balanced(expected[passages.real], passages.active[passages.real])) / 2


def any_of(expected: Bool[np.ndarray, "n pos"]) -> Bool[np.ndarray, " n"]:
    """Passages with any such token."""
    return np.asarray(expected.any(axis=1))


def _balanced(said: Bool[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float:
    """Mean of the two shares of right answers; NaN where only one kind is there."""
    if truth.all() or not truth.any():
        return float("nan")
    return float(said[truth].mean() + (~said[~truth]).mean()) / 2


def _grow(kind: str, passages: Passages) -> Rule:
    """A list of words, by adding the best one while that helps."""
    masks = {word: Rule(kind, (word,)).expects(passages) for word in _candidates(kind, passages)}
    words: tuple[str, ...] = ()
    expected, best = np.zeros_like(passages.real), 0.5
    while masks and len(words) < MOST_WORDS:
        scores = {word: _fit(expected | mask, passages) for word, mask in masks.items()}
        word = max(scores, key=lambda w: (scores[w], w))
        if not scores[word] > best + LEAST_GAIN:
            break
        words, best, expected = (*words, word), scores[word], expected | masks.pop(word)
    return Rule(kind, words)


def _candidates(kind: str, passages: Passages) -> list[str]:
    """Words that are in more passages with the latent than in those without it; `token` and `after`: at its tokens."""
    shares: dict[str, list[float]] = {}
    counts = (passages.fires.sum(), (~passages.fires).sum())
    for n, fires in enumerate(passages.fires):
        for word in set(_at(kind, passages, n) if fires else _all(kind, passages, n)):
            shares.setdefault(word, [0.0, 0.0])[0 if fires else 1] += 1 / counts[0 if fires else 1]
    least = 3 / counts[0]
    useful = [
        (more - less, word) for word, (more, less) in shares.items() if more >= least * (1 - 1e-9) and more > less
    ]
    return [word for _, word in sorted(useful, reverse=True)[:CANDIDATES]]


def _all(kind: str, passages: Passages, n: int) -> Iterator[str]:
    text = passages.text[n]
    yield from ((passages.before[n], *text[:-1]) if kind == "after" else text)


def _at(kind: str, passages: Passages, n: int) -> Iterator[str]:
    """The words at (for `after`: before) the tokens on which the latent fires; for `passage` all up to the last."""
    values = passages.windows[n].values > 0
    if kind == "passage":
        yield from passages.text[n][: int(np.flatnonzero(values)[-1]) + 1]
        return
    yield from (word for word, fires in zip(_all(kind, passages, n), values, strict=True) if fires)


# --- The two scores

FITS_HALF = 0.5
"""Share of the marked tokens that a rule must expect to call the marks right."""


@dataclass(frozen=True)
class Marked:
    """A passage with marked tokens."""

    window: int
    """Its number."""
    marks: tuple[int, ...]
    right: bool
    """Whether these are the tokens on which the latent fires."""


def marked_passages(passages: Passages, seed: int = 0) -> list[Marked]:
    """Every activating passage with its own tokens marked, and as many passages again with wrong marks.

    Wrong marks are of delphi's two kinds, in turn: those of an activating passage on a silent one, and those of an
    activating passage moved to tokens of it on which the latent is silent.
    """
    rng, firing, silent = random.Random(seed), np.flatnonzero(passages.fires), np.flatnonzero(~passages.fires)
    out = [Marked(int(n), tuple(np.flatnonzero(passages.active[n]).tolist()), True) for n in firing]
    for turn, one in enumerate(out[:]):
        quiet = np.flatnonzero(passages.real[one.window] & ~passages.active[one.window]).tolist()
        if turn % 2 and quiet:
            count = min(len(one.marks), len(quiet))
            out.append(Marked(one.window, tuple(sorted(rng.sample(quiet, count))), False))
        elif len(silent):
            other = int(rng.choice(silent.tolist()))
            length = int(passages.real[other].sum())
            marks = tuple(sorted({min(place, length - 1) for place in one.marks}))
            out.append(Marked(other, marks, False))
    return out


def balanced_accuracy(said: Sequence[bool], truth: Sequence[bool], groups: Sequence[object]) -> Estimate:
    """Mean of sensitivity and specificity, with the jackknife's 95% interval over questions; `n` is of passages.

    Ends are NaN where the score rests on one question.
    """
    told, true = np.asarray(said, dtype=bool), np.asarray(truth, dtype=bool)
    names = np.array([str(group) for group in groups])
    value = _balanced(told, true)
    without = [_balanced(told[names != name], true[names != name]) for name in dict.fromkeys(names.tolist())]
    low, high = jackknife_interval(value, without)
    return Estimate(value, float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1)), len(told))


def score_rule(rule: Rule, passages: Passages) -> tuple[Estimate, Estimate]:
    """Detection and fuzzing of a rule."""
    expected = rule.expects(passages)
    detection = balanced_accuracy(any_of(expected).tolist(), passages.fires.tolist(), passages.groups)
    tasks = marked_passages(passages)
    said = [bool(expected[task.window, list(task.marks)].mean() >= FITS_HALF) for task in tasks]
    groups = [passages.groups[task.window] for task in tasks]
    return detection, balanced_accuracy(said, [task.right for task in tasks], groups)


# --- A latent's label


def split_passages(windows: Sequence[Window], words: Callable[[int], str]) -> tuple[Passages, Passages]:
    """Passages that make a label, and those that score it. No question has passages on both sides."""
    return (
        Passages([window for window in windows if not window.held_out], words),
        Passages([window for window in windows if window.held_out], words),
    )


def too_few(halves: Sequence[Passages]) -> str:
    """Why a latent cannot have a label; empty where it can."""
    for half in halves:
        fires, silent = int(half.fires.sum()), int((~half.fires).sum())
        for count, what in ((fires, "it fires in"), (silent, "it is silent in")):
            if count < ENOUGH:
                return f"{what} {count} of {fires + silent} passages of one half, {ENOUGH} are needed"
        if len(set(half.groups)) < ENOUGH:
            return f"one half has passages of {len(set(half.groups))} questions, {ENOUGH} are needed"
    return ""


def label_by_rule(windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase) -> Explanation:
    """The best rule of one half of the questions, scored on the other half."""
    halves = split_passages(windows, word_of(tokenizer))
    if reason := too_few(halves):
        return Explanation("", "rule", None, None, reason)
    rule = fit_rule(halves[0])
    return explanation(str(rule), "rule", *score_rule(rule, halves[1]))


def label_by_tokens(windows: Sequence[Window], tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Explanation:
    """The tokens that a latent's decoder row promotes, taken as its label: what unembedding labels are worth."""
    words = word_of(tokenizer)
    halves = split_passages(windows, words)
    if reason := too_few(halves):
        return Explanation("", "unembedding", None, None, reason)
    rule = Rule("token", tuple(dict.fromkeys(words(token) for token in ids)))
    return explanation(str(rule), "unembedding", *score_rule(rule, halves[1]))


def explanation(text: str, author: str, detection: Estimate, fuzzing: Estimate) -> Explanation:
    """A label with its scores; without scores where an interval cannot be computed."""
    if not all(np.isfinite([one.estimate, one.ci_low, one.ci_high]).all() for one in (detection, fuzzing)):
        return Explanation(text, author, None, None, "its score rests on a single question")
    lowest = min(detection.estimate, fuzzing.estimate)
    return Explanation(text, author, detection, fuzzing, "" if lowest >= LEAST_SCORE else f"under {LEAST_SCORE:g}")
