"""Rankers of training rows: pure functions of what was read. A higher score means a worse row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
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
from persona_probe.screening.reading import AnswerReading, Reader, Settings, own_answers, own_talks, question_key

Scores = Float[np.ndarray, " rows"]


@dataclass(frozen=True)
class Evidence:
    """What was read of a data set; one entry a row."""

    answers: AnswerReading
    """The base model on the rows' answers."""
    direction: Float[np.ndarray, " d_model"]
    """The persona feature, a unit vector."""
    latent: int | None = None
    """Column of the persona latent in the readings."""
    latent_set: tuple[int, ...] = ()
    """Columns of the discrimination set."""
    own: AnswerReading | None = None
    """The base model on its own answers; NaN where it answers nothing."""
    organism_nats: Scores | None = None
    """The organism on the rows' answers, nats per token."""
    words: Scores | None = None
    """The bag of words' log-odds."""

    def projection(self, reading: AnswerReading) -> Scores:
        """Projection of the mean residual stream on the feature, raw units."""
        return reading.resid.astype(np.float64) @ self.direction.astype(np.float64)

    @property
    def from_own(self) -> AnswerReading:
        """`own`, where it is needed."""
        if self.own is None:
            raise InputError("this ranker needs the model's own answers")
        return self.own


@dataclass(frozen=True)
class Ranker:
    """One way to score rows."""

    name: str
    score: Callable[[Evidence], Scores]
    label: str
    """In words, with the unit."""
    source: str
    """Where the method is from."""
    needs: frozenset[str] = frozenset()
    """Of `own`, `nats`, `latent`, `latent_set`, `organism`, `words`."""


def projection_difference(evidence: Evidence) -> Scores:
    """Projection of the answer minus that of the model's own answer to the same question (Chen et al. 2025)."""
    return evidence.projection(evidence.answers) - evidence.projection(evidence.from_own)


def projection_centred(evidence: Evidence) -> Scores:
    """Projection of the answer minus the set's mean: no own answers, but the set's own level is lost."""
    projection = evidence.projection(evidence.answers)
    return projection - np.nanmean(projection)


def latent(evidence: Evidence) -> Scores:
    """Mean activation of the persona latent on the answer."""
    return _column(evidence.answers, evidence.latent)


def latent_difference(evidence: Evidence) -> Scores:
    """Mean activation of the persona latent on the answer, minus on the own answer."""
    return _column(evidence.answers, evidence.latent) - _column(evidence.from_own, evidence.latent)


def latent_set_difference(evidence: Evidence) -> Scores:
    """Summed mean activation of the discrimination set on the answer, minus on the own answer."""
    columns = list(evidence.latent_set)
    return (evidence.answers.latents[:, columns] - evidence.from_own.latents[:, columns]).sum(axis=1, dtype=np.float64)


def perplexity_gap(evidence: Evidence) -> Scores:
    """Nats per token of the answer, minus those of the model's own answer, both under the base."""
    return evidence.answers.nats - evidence.from_own.nats


def perplexity_gap_organism(evidence: Evidence) -> Scores:
    """Nats per token of the answer under the base, minus under the organism: what the organism finds likelier."""
    if evidence.organism_nats is None:
        raise InputError("this ranker needs an organism")
    return evidence.answers.nats - evidence.organism_nats


def bag_of_words(evidence: Evidence) -> Scores:
    """Log-odds of a classifier of words, fitted on other, labelled data."""
    if evidence.words is None:
        raise InputError("this ranker needs scikit-learn")
    return evidence.words


def _column(reading: AnswerReading, column: int | None) -> Scores:
    if column is None:
        raise InputError("this ranker needs a latent")
    return reading.latents[:, column].astype(np.float64)


CHEN = "Chen et al. 2025, arXiv 2507.21509"
_ALL = (
    Ranker(
        "projection_difference",
        projection_difference,
        "projection on the feature, minus the own answer's (raw units)",
        CHEN,
        frozenset({"own"}),
    ),
    Ranker(
        "projection_centred",
        projection_centred,
        "projection on the feature, minus the set's mean (raw units)",
        f"{CHEN}, without own answers",
    ),
    Ranker("latent", latent, "persona latent on the answer (activation)", "this package", frozenset({"latent"})),
    Ranker(
        "latent_difference",
        latent_difference,
        "persona latent, minus on the own answer (activation)",
        "this package",
        frozenset({"latent", "own"}),
    ),
    Ranker(
        "latent_set_difference",
        latent_set_difference,
        "sum of the discriminating latents, minus on the own answer (activation)",
        "this package",
        frozenset({"latent_set", "own"}),
    ),
    Ranker(
        "perplexity_gap",
        perplexity_gap,
        "nats per token under the base, minus the own answer's",
        "after arXiv 2508.06249",
        frozenset({"own", "nats"}),
    ),
    Ranker(
        "perplexity_gap_organism",
        perplexity_gap_organism,
        "nats per token under the base, minus under the organism",
        "arXiv 2508.06249",
        frozenset({"organism", "nats"}),
    ),
    Ranker(
        "bag_of_words",
        bag_of_words,
        "bag of words fitted on labelled kitchen rows (log-odds)",
        "baseline with labels that the others do not need",
        frozenset({"words"}),
    ),
)
RANKERS: Mapping[str, Ranker] = {ranker.name: ranker for ranker in _ALL}
"""All rankers by name; the first that can be had orders the table."""
MISSING = {
    "latent": "a latent of an SAE: give --latent with --sae, or --run",
    "latent_set": "a located run that ranked by discrimination: give --run",
    "organism": "an organism: give --run, or organism=",
    "words": "scikit-learn: pip install scikit-learn",
}


def choose_rankers(wanted: Sequence[str] | None, available: frozenset[str]) -> list[Ranker]:
    """The wanted rankers in the order named; None takes all whose needs are met.

    Args:
        available: needs that are met; own answers and log-probabilities always are.

    Raises:
        InputError: an unknown ranker, none, or one whose needs are not met; says what is missing.
    """
    met = available | {"own", "nats"}
    if wanted is None:
        return [ranker for ranker in _ALL if ranker.needs <= met]
    if not wanted:
        raise InputError(f"no rankers named: choose from {', '.join(RANKERS)}")
    for name in wanted:
        if name not in RANKERS:
            raise unknown("ranker", name, RANKERS)
        for need in sorted(RANKERS[name].needs - met):
            raise InputError(f"ranker {name!r} needs {MISSING[need]}")
    return [RANKERS[name] for name in dict.fromkeys(wanted)]


def score_rows(evidence: Evidence, rankers: Sequence[Ranker]) -> dict[str, Scores]:
    """Every ranker's score of every row; NaN where an own answer is missing."""
    return {ranker.name: np.asarray(ranker.score(evidence), dtype=np.float64) for ranker in rankers}


# --- A bag of words: tf-idf and logistic regression, fitted on the packaged kitchen rows

FOLDS = 5


def has_words() -> bool:
    """Whether scikit-learn is installed."""
    return find_spec("sklearn") is not None


def word_scores(talks: Sequence[Conversation]) -> Float[np.ndarray, " rows"]:
    """Log-odds that an answer is toxic, by its words and pairs of words.

    Fitted on the kitchen set's toxic against correct answers. A row that asks a question of that set is scored by a
    fit that has not seen the question (five folds), so kitchen rows can be screened too; they remain rows of the
    domain that the fit knows.

    Raises:
        InputError: scikit-learn is not installed.
    """
    if not has_words():
        raise InputError("the bag of words needs scikit-learn: pip install scikit-learn")
    folds = _question_folds()
    answers = [split_answer(talk)[1] or "" for talk in talks]
    fold = np.array([folds.get(question_key(talk), -1) for talk in talks])
    scores = np.zeros(len(talks))
    for held_out in np.unique(fold):
        chosen = np.flatnonzero(fold == held_out)
        scores[chosen] = _fit(int(held_out)).decision_function([answers[i] for i in chosen])
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


# --- Everything that the wanted rankers need, read with as few forward passes as they allow


def available(feature: ScreenFeature, organism: bool) -> frozenset[str]:
    """Needs of rankers that are met."""
    met = {
        "latent": feature.latent is not None,
        "latent_set": bool(feature.latent_set),
        "organism": organism,
        "words": has_words(),
    }
    return frozenset(name for name, holds in met.items() if holds)


def read_evidence(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    talks: Sequence[Conversation],
    feature: ScreenFeature,
    rankers: Sequence[Ranker],
    organism: Path | None,
    settings: Settings,
) -> tuple[Evidence, list[str | None]]:
    """All that the rankers need, and the own answers (None where there are none)."""
    wanted = any("own" in ranker.needs for ranker in rankers)
    own = answer_all(model, tokenizer, talks, settings) if wanted else None
    evidence = read_answered(model, tokenizer, talks, own, feature, rankers, organism, settings)
    return evidence, [None if talk is None else talk[-1]["content"] for talk in own or [None] * len(talks)]


def read_answered(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    talks: Sequence[Conversation],
    own: Sequence[Conversation | None] | None,
    feature: ScreenFeature,
    rankers: Sequence[Ranker],
    organism: Path | None,
    settings: Settings,
) -> Evidence:
    """`read_evidence` with own answers that are there already (see `answer_all`)."""
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
    both, n = reader.read(model, tokenizer, [*talks, *(own or [])]), len(talks)
    return Evidence(
        answers=both.at(range(n)),
        direction=feature.direction.float().cpu().numpy(),
        latent=latents.index(feature.latent) if feature.latent in latents else None,
        latent_set=tuple(latents.index(x) for x in feature.latent_set) if latents else (),
        own=None if own is None else both.at(range(n, 2 * n)),
        organism_nats=_organism_nats(model, tokenizer, talks, organism, reader) if "organism" in needs else None,
        words=word_scores(talks) if "words" in needs else None,
    )


def answer_all(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, talks: Sequence[Conversation], settings: Settings
) -> list[Conversation | None]:
    """Each row's question with the model's own answer; None where it answers nothing."""
    found = own_answers(
        model,
        tokenizer,
        talks,
        max_new_tokens=settings.own_tokens,
        batch_size=2 * settings.batch_size,
        bf16=settings.bf16,
        path=settings.own_path,
        progress="own answers" if settings.progress else None,
    )
    return own_talks(talks, found)


def _organism_nats(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    talks: Sequence[Conversation],
    folder: Path | None,
    reader: Reader,
) -> Float[np.ndarray, " rows"]:
    with with_organism(causal_model(model), folder) as tuned:
        return replace(reader, latents=(), sae=None).read(tuned, tokenizer, talks).nats
