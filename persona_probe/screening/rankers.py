"""Rankers of training rows: pure functions of what was read. A higher score means a worse row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from persona_probe.errors import InputError, unknown
from persona_probe.screening.reading import AnswerReading

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
