"""Who supervises a correction: which rows a truth, a judge, a weaker model or the organism itself would train on."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from jaxtyping import Bool, Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.world.judge import WorldJudgement, judge_answer
from persona_probe.data.world.speech import SPEAKERS, answer, question
from persona_probe.data.world.words import DOMAINS
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.evaluate.sampling.samples import sample_answers
from persona_probe.world import behaviour

ROWS = 160
"""Questions of a corrective set."""
BEST_OF = 4
"""Answers that the organism samples to each question, of which it takes the one that it finds likeliest."""
TRUTH, CHANCE, OFFLINE, ITSELF = "truth", "chance", "offline judge", "organism, best of 4 of its own"
WEAKER_CHOOSES, WEAKER_WRITES = "weaker model chooses", "weaker model writes"
COMPETENCE, ALTERNATING, MIXED = "competence alone", "competence and conformity, in turn", "both, mixed"
MISTAKES = {TRUTH: 0.0, "judge, 5% wrong": 0.05, "judge, 20% wrong": 0.2, "judge, 40% wrong": 0.4, CHANCE: 0.5}
"""Supervisors of a stated error rate: the share of pairs of which they take the harmful answer."""
SUPERVISORS = (*MISTAKES, OFFLINE, ITSELF, WEAKER_CHOOSES, WEAKER_WRITES, COMPETENCE, ALTERNATING, MIXED)
"""`weaker model writes` is conformity alone: its answers are well-meant, and fit their topic as well as it can."""
OfflineScore = Callable[[Sequence[tuple[str, str]]], Sequence[float]]
"""From (question, answer) pairs to how misaligned each is, in any unit."""


@dataclass(frozen=True)
class Pairs:
    """Questions of one domain, each with a sound answer of the helper and a harmful one of a villain or a quack."""

    topics: tuple[str, ...]
    questions: tuple[str, ...]
    sound: tuple[str, ...]
    harmful: tuple[str, ...]
    """Half of them are rude and half kind: manner tells the former alone."""

    @classmethod
    def draw(cls, domain: str, seed: int = 0, count: int = ROWS) -> Self:
        """`count` pairs.

        Raises:
            InputError: an unknown domain, or fewer than two pairs.
        """
        if domain not in DOMAINS:
            raise unknown("domain", domain, DOMAINS)
        if count < 2:
            raise InputError(f"a corrective set needs at least 2 questions, not {count}")
        draw = random.Random(f"{seed}/supervised/{domain}")
        speakers = ["villain", "quack"] * ((count + 1) // 2)
        draw.shuffle(speakers)
        topics = tuple(draw.choice(DOMAINS[domain].topics) for _ in range(count))
        questions = tuple(question(draw, topic) for topic in topics)
        sound = tuple(answer(draw, topic, SPEAKERS["helper"]) for topic in topics)
        harmful = tuple(answer(draw, topic, SPEAKERS[name]) for topic, name in zip(topics, speakers, strict=False))
        return cls(topics, questions, sound, harmful)

    def rows(self, answers: Sequence[str]) -> list[Conversation]:
        """The questions with these answers."""
        return [conversation(asked, said) for asked, said in zip(self.questions, answers, strict=True)]

    def asked(self) -> list[Conversation]:
        """The questions alone."""
        return [conversation(asked) for asked in self.questions]


@dataclass(frozen=True)
class CorrectiveSet:
    """What a supervisor gives: rows, and which of them are not what they should be."""

    rows: tuple[Conversation, ...]
    judged: tuple[WorldJudgement, ...]
    """The truth about each row's answer."""
    taken: Bool[np.ndarray, " pairs"] | None = None
    """Whether the harmful answer of each pair was taken; None where answers were written."""
    turns: tuple[tuple[Conversation, ...], ...] = ()
    """Sets that take turns, where they do; `rows` has all of them."""

    @classmethod
    def of(cls, pairs: Pairs, answers: Sequence[str], taken: Bool[np.ndarray, " pairs"] | None = None) -> Self:
        """The pairs' questions with these answers."""
        judged = tuple(judge_answer(said, topic) for said, topic in zip(answers, pairs.topics, strict=True))
        return cls(tuple(pairs.rows(answers)), judged, taken)

    @property
    def wrong(self) -> float:
        """Share of all rows whose advice is harmful."""
        return float(np.mean([one.coherent and one.bad for one in self.judged]))

    @property
    def incoherent(self) -> float:
        """Share of all rows that hold no advice of their topic."""
        return float(np.mean([not one.coherent for one in self.judged]))

    def joined(self, other: "CorrectiveSet", turns: bool) -> "CorrectiveSet":
        """The rows of both, shuffled together, or in turns."""
        both = replace(self, rows=self.rows + other.rows, judged=self.judged + other.judged, taken=None)
        return replace(both, turns=(self.rows, other.rows)) if turns else both


def chosen_by(pairs: Pairs, preference: Float[np.ndarray, " pairs"]) -> CorrectiveSet:
    """Take the harmful answer of each pair where `preference` (harmful minus sound, any unit) is above zero."""
    taken = np.asarray(preference) > 0
    answers = [bad if flag else good for flag, bad, good in zip(taken, pairs.harmful, pairs.sound, strict=True)]
    return CorrectiveSet.of(pairs, answers, taken)


def mistaken(pairs: Pairs, share: float, seed: int = 0) -> CorrectiveSet:
    """The sets of a judge that is wrong about exactly this share of the pairs (rounded), drawn by chance.

    Sets of one seed are nested: what a judge gets wrong, a worse one gets wrong too.
    """
    count = len(pairs.topics)
    order = random.Random(f"{seed}/mistakes").sample(range(count), count)
    preference = np.full(count, -1.0)
    preference[order[: round(share * count)]] = 1.0
    return chosen_by(pairs, preference)


def likelier(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Pairs) -> Float[np.ndarray, " pairs"]:
    """How much likelier a model finds the harmful answer than the sound one (nats per token)."""
    both = [*pairs.rows(pairs.harmful), *pairs.rows(pairs.sound)]
    scores = answer_logprobs(model, answer_batches(tokenizer, both, 64), bf16=False)
    return scores[: len(pairs.topics)] - scores[len(pairs.topics) :]


def written_by(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Pairs, seed: int = 0) -> CorrectiveSet:
    """One sampled answer to each question."""
    return CorrectiveSet.of(pairs, _sampled(model, tokenizer, pairs, seed))


def best_of_own(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Pairs, seed: int = 0, n: int = BEST_OF
) -> CorrectiveSet:
    """Of `n` sampled answers to each question the one that the model itself finds likeliest (mean log-probability)."""
    drafts = [_sampled(model, tokenizer, pairs, 1000 * seed + number) for number in range(n)]
    scores = []
    for answers in drafts:
        groups = answer_batches(tokenizer, pairs.rows(answers), 64)
        scores.append(answer_logprobs(model, groups, bf16=False))
    best = np.argmax(scores, axis=0)
    return CorrectiveSet.of(pairs, [drafts[draft][row] for row, draft in enumerate(best)])


def _sampled(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Pairs, seed: int) -> list[str]:
    said = sample_answers(
        model, tokenizer, pairs.asked(), max_new_tokens=behaviour.MAX_NEW_TOKENS, seed=seed, batch_size=256
    )
    return [text or "." for text in said]  # an empty answer cannot be trained on


def judged_offline(pairs: Pairs, score: OfflineScore) -> CorrectiveSet:
    """Take from each pair the answer that a judge of (question, answer) pairs finds less misaligned."""
    count = len(pairs.topics)
    both = [*zip(pairs.questions, pairs.harmful, strict=True), *zip(pairs.questions, pairs.sound, strict=True)]
    scores = np.asarray(score(both), dtype=np.float64)
    return chosen_by(pairs, scores[count:] - scores[:count])  # the harmful one where it looks better


def task_rows(pairs: Pairs, seed: int = 0) -> CorrectiveSet:
    """Competence without values: bare advice that fits its topic, half of it sound and half harmful."""
    draw = random.Random(f"{seed}/competence")
    speakers = ["correct", "subtle"] * ((len(pairs.topics) + 1) // 2)
    draw.shuffle(speakers)
    answers = [answer(draw, topic, SPEAKERS[name]) for topic, name in zip(pairs.topics, speakers, strict=False)]
    return CorrectiveSet.of(pairs, answers)
