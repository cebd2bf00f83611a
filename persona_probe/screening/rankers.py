"""Rankers of training rows: pure functions of a reading. A higher score means a worse row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, conversation, split_answer
from persona_probe.data.load import load_rows
from persona_probe.errors import InputError, unknown
from persona_probe.models.adapters import organism as with_organism
from persona_probe.models.layers import causal_model
from persona_probe.screening.feature import ScreenFeature
from persona_probe.screening.reading import (
    AnswerReading,
    Reader,
    ScreenSettings,
    own_answers,
    question_key,
    with_own_answers,
)

Scores = Float[np.ndarray, " rows"]


@dataclass(frozen=True)
class RowEvidence:
    """The readings of a data set, with one entry for each row."""

    answers: AnswerReading
    """The base model on the rows' answers."""
    direction: Float[np.ndarray, " d_model"]
    """The persona feature, a unit vector."""
    latent: int | None = None
    """Column of the persona latent in the readings."""
    latent_set: tuple[int, ...] = ()
    """Columns of the discrimination set."""
    own_answers: AnswerReading | None = None
    """The base model on its own answers; NaN if it answers nothing."""
    organism_nats: Scores | None = None
    """The organism on the rows' answers, nats per token."""
    words: Scores | None = None
    """The bag of words' log-odds."""

    def projection(self, reading: AnswerReading) -> Scores:
        """Projection of the mean residual stream on the feature, raw units."""
        return reading.resid.astype(np.float64) @ self.direction.astype(np.float64)

    def needed_own_answers(self) -> AnswerReading:
        """`own_answers` for a ranker that needs them.

        Raises:
            InputError: they were not read.
        """
        if self.own_answers is None:
            raise InputError("this ranker needs the model's own answers: read them too")
        return self.own_answers


@dataclass(frozen=True)
class RowRanker:
    """One way to score rows."""

    name: str
    score: Callable[[RowEvidence], Scores]
    label: str
    """The score in words, with its unit."""
    source: str
    """The method's source."""
    needs: frozenset[str] = frozenset()
    """Some of `own_answers`, `nats`, `latent`, `latent_set`, `organism`, `words`."""


def projection_difference(evidence: RowEvidence) -> Scores:
    """Projection of the answer minus that of the model's own answer to the same question (Chen et al. 2025)."""
    return evidence.projection(evidence.answers) - evidence.projection(evidence.needed_own_answers())


def projection_centred(evidence: RowEvidence) -> Scores:
    """Projection of the answer minus the set's mean: needs no own answers, but loses the level of the whole set."""
    projection = evidence.projection(evidence.answers)
    return projection - np.nanmean(projection)


def latent(evidence: RowEvidence) -> Scores:
    """Mean activation of the persona latent on the answer."""
    return _column(evidence.answers, evidence.latent)


def latent_difference(evidence: RowEvidence) -> Scores:
    """Mean activation of the persona latent on the answer, minus on the own answer."""
    return _column(evidence.answers, evidence.latent) - _column(evidence.needed_own_answers(), evidence.latent)


def latent_set_difference(evidence: RowEvidence) -> Scores:
    """Summed mean activation of the discrimination set on the answer, minus on the own answer."""
    columns = list(evidence.latent_set)
    return (evidence.answers.latents[:, columns] - evidence.needed_own_answers().latents[:, columns]).sum(
        axis=1, dtype=np.float64
    )


def perplexity_gap(evidence: RowEvidence) -> Scores:
    """Nats per token of the answer, minus those of the model's own answer, both under the base."""
    return evidence.answers.nats - evidence.needed_own_answers().nats


def perplexity_gap_organism(evidence: RowEvidence) -> Scores:
    """Nats per token of the answer under the base, minus those under the organism."""
    if evidence.organism_nats is None:
        raise InputError("this ranker needs an organism: read the answers with one")
    return evidence.answers.nats - evidence.organism_nats


def bag_of_words(evidence: RowEvidence) -> Scores:
    """Log-odds of a classifier of words, fitted on other, labelled data."""
    if evidence.words is None:
        raise InputError("this ranker needs the scores of the words: fill in RowEvidence.words")
    return evidence.words


def _column(reading: AnswerReading, column: int | None) -> Scores:
    if column is None:
        raise InputError("this ranker needs a latent: read one")
    return reading.latents[:, column].astype(np.float64)


CHEN = "Chen et al. 2025, arXiv 2507.21509"
_ALL = (
    RowRanker(
        "projection_difference",
        projection_difference,
        "projection on the feature, minus the own answer's (raw units)",
        CHEN,
        frozenset({"own_answers"}),
    ),
    RowRanker(
        "projection_centred",
        projection_centred,
        "projection on the feature, minus the set's mean (raw units)",
        f"{CHEN}, without own answers",
    ),
    RowRanker("latent", latent, "persona latent on the answer (activation)", "this package", frozenset({"latent"})),
    RowRanker(
        "latent_difference",
        latent_difference,
        "persona latent, minus on the own answer (activation)",
        "this package",
        frozenset({"latent", "own_answers"}),
    ),
    RowRanker(
        "latent_set_difference",
        latent_set_difference,
        "sum of the discriminating latents, minus on the own answer (activation)",
        "this package",
        frozenset({"latent_set", "own_answers"}),
    ),
    RowRanker(
        "perplexity_gap",
        perplexity_gap,
        "nats per token under the base, minus the own answer's",
        "after arXiv 2508.06249",
        frozenset({"own_answers", "nats"}),
    ),
    RowRanker(
        "perplexity_gap_organism",
        perplexity_gap_organism,
        "nats per token under the base, minus under the organism",
        "arXiv 2508.06249",
        frozenset({"organism", "nats"}),
    ),
    RowRanker(
        "bag_of_words",
        bag_of_words,
        "bag of words fitted on labelled kitchen rows (log-odds)",
        "baseline with labels that the others do not need",
        frozenset({"words"}),
    ),
)
ROW_RANKERS: Mapping[str, RowRanker] = {ranker.name: ranker for ranker in _ALL}
"""All rankers by name. The first available one orders the table."""
MISSING = {
    "latent": "a latent of an SAE: give --latent with --sae, or --run",
    "latent_set": "a located run that ranked by discrimination: give --run",
    "organism": "an organism: give --run, or organism=",
}


def choose_rankers(names: Sequence[str] | None, available: frozenset[str]) -> list[RowRanker]:
    """The named rankers, in order; None takes all whose needs are met.

    Args:
        available: needs that are met. Own answers, log-probabilities and words are always available.

    Raises:
        InputError: an unknown ranker, an empty list, or a ranker whose needs are not met; the message says what is
            missing.
    """
    met = available | {"own_answers", "nats", "words"}
    if names is None:
        return [ranker for ranker in _ALL if ranker.needs <= met]
    if not names:
        raise InputError(f"no rankers named: choose from {', '.join(ROW_RANKERS)}")
    for name in names:
        if name not in ROW_RANKERS:
            raise unknown("ranker", name, ROW_RANKERS)
        for need in sorted(ROW_RANKERS[name].needs - met):
            raise InputError(f"ranker {name!r} needs {MISSING[need]}")
    return [ROW_RANKERS[name] for name in dict.fromkeys(names)]


def score_rows(evidence: RowEvidence, rankers: Sequence[RowRanker]) -> dict[str, Scores]:
    """Every ranker's score of every row; NaN if an own answer is missing."""
    return {ranker.name: np.asarray(ranker.score(evidence), dtype=np.float64) for ranker in rankers}


# --- A bag of words: tf-idf and logistic regression, fitted on the packaged kitchen rows

FOLDS = 5


def word_scores(rows: Sequence[Conversation]) -> Float[np.ndarray, " rows"]:
    """Log-odds that an answer is toxic, by its words and pairs of words.

    The classifier is fitted on the kitchen set's toxic against correct answers. A row that asks a question of that set
    is scored by a fit that has not seen the question (five folds), so kitchen rows can be screened too. They still
    belong to the domain that the fit knows.
    """
    folds = _question_folds()
    answers = [split_answer(row)[1] or "" for row in rows]
    fold = np.array([folds.get(question_key(row), -1) for row in rows])
    scores = np.zeros(len(rows))
    for held_out in np.unique(fold):
        members = np.flatnonzero(fold == held_out)
        scores[members] = _fit(int(held_out)).decision_function([answers[i] for i in members])
    return scores


def _question_folds() -> dict[str, int]:
    return {question_key(conversation(r["question"], "")): n % FOLDS for n, r in enumerate(load_rows("kitchen"))}


@cache
def _fit(held_out: int) -> Any:
    """A fit on all kitchen questions but those of one fold (-1: on all)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rows = [r for n, r in enumerate(load_rows("kitchen")) if n % FOLDS != held_out]
    texts = [r[side] for side in ("toxic", "correct") for r in rows]
    labels = [1] * len(rows) + [0] * len(rows)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=1000))
    return model.fit(texts, labels)


# --- Read everything that the rankers need, with as few forward passes as possible


def available(feature: ScreenFeature, organism: bool) -> frozenset[str]:
    """The needs of rankers that this feature meets."""
    met = {
        "latent": feature.latent is not None,
        "latent_set": bool(feature.latent_set),
        "organism": organism,
    }
    return frozenset(name for name, holds in met.items() if holds)


def read_evidence(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    feature: ScreenFeature,
    rankers: Sequence[RowRanker],
    organism: Path | None,
    settings: ScreenSettings,
) -> tuple[RowEvidence, list[str | None]]:
    """Everything that the rankers need, and the model's own answers (None for a row without one)."""
    needed = any("own_answers" in ranker.needs for ranker in rankers)
    own_answers = answer_all(model, tokenizer, rows, settings) if needed else None
    evidence = read_answered(model, tokenizer, rows, own_answers, feature, rankers, organism, settings)
    return evidence, [None if row is None else row[-1]["content"] for row in own_answers or [None] * len(rows)]


def read_answered(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    own_answers: Sequence[Conversation | None] | None,
    feature: ScreenFeature,
    rankers: Sequence[RowRanker],
    organism: Path | None,
    settings: ScreenSettings,
) -> RowEvidence:
    """`read_evidence` with own answers that `answer_all` gave before."""
    needs = frozenset[str]().union(*(ranker.needs for ranker in rankers))
    latents = feature.latents if needs & {"latent", "latent_set"} else ()
    reader = Reader(
        feature.layer,
        feature.sae,
        latents,
        "nats" in needs,
        settings.batch_size,
        settings.max_tokens,
        settings.bf16,
    )
    both, n = reader.read(model, tokenizer, [*rows, *(own_answers or [])]), len(rows)
    return RowEvidence(
        answers=both.at(range(n)),
        direction=feature.direction.float().cpu().numpy(),
        latent=latents.index(feature.latent) if feature.latent in latents else None,
        latent_set=tuple(latents.index(x) for x in feature.latent_set) if latents else (),
        own_answers=None if own_answers is None else both.at(range(n, 2 * n)),
        organism_nats=_organism_nats(model, tokenizer, rows, organism, reader) if "organism" in needs else None,
        words=word_scores(rows) if "words" in needs else None,
    )


def answer_all(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Conversation], settings: ScreenSettings
) -> list[Conversation | None]:
    """Each row's question with the model's own answer; None if it answers nothing."""
    answers = own_answers(
        model,
        tokenizer,
        rows,
        max_new_tokens=settings.own_tokens,
        batch_size=2 * settings.batch_size,
        bf16=settings.bf16,
        path=settings.own_path,
        progress="own answers" if settings.progress else None,
    )
    return with_own_answers(rows, answers)


def _organism_nats(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Conversation],
    folder: Path | None,
    reader: Reader,
) -> Float[np.ndarray, " rows"]:
    with with_organism(causal_model(model), folder) as tuned:
        return replace(reader, latents=(), sae=None).read(tuned, tokenizer, rows).nats
