"""How far two judges agree: answer by answer, and in how they rank models."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import norm, spearmanr, t

from persona_probe.errors import InputError
from persona_probe.evaluate.rates import draw_weights, rates
from persona_probe.stats import FEW_CLUSTERS, Estimate, jackknife_interval

ANSWER = ["questions", "sampling", "arm", "seed", "step", "prompt", "sample"]
"""Columns that name one answer."""
MODEL = ["arm", "seed", "step", "variant"]
MISALIGNED_FROM = 0.5
"""Value from which a judge that gives probabilities counts as saying misaligned."""
_LEAST_MODELS = 3


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same answers."""

    left: str
    """Evaluation by the first judge."""
    right: str
    kappa: Estimate | None
    """Cohen's kappa of misaligned or not, with its interval over questions; None if both always say the same."""
    agree: float
    """Share of answers on which both say the same."""
    alignment_correlation: float | None
    """Spearman's, over answers with an alignment score from both."""
    rate_correlation: float | None
    """Spearman's, over models; None with fewer than three, or if a judge gives all the same rate."""
    answers: int
    """Judged misaligned or not by both."""
    models: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        kappa = "no kappa (both always say the same)" if self.kappa is None else f"kappa {self.kappa}"
        ranks = "" if self.rate_correlation is None else f", rank correlation of rates {self.rate_correlation:.2f}"
        return f"{self.left} and {self.right}: {kappa} on {self.answers} answers, {self.models} models{ranks}"


def _tables(left: Bool[np.ndarray, " n"], right: Bool[np.ndarray, " n"]) -> Float[np.ndarray, "n 4"]:
    """One answer a row: both yes, left only, right only, neither."""
    return np.stack([left & right, left & ~right, ~left & right, ~left & ~right], axis=1).astype(np.float64)


def _kappa(counts: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """Cohen's kappa (1960) of each table: (observed - expected) / (1 - expected); NaN where expected is 1."""
    totals = counts.sum(axis=1, keepdims=True)
    both, first, second, neither = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0).T
    chance = (both + first) * (both + second) + (neither + first) * (neither + second)
    return np.divide(both + neither - chance, 1 - chance, out=np.full(len(counts), np.nan), where=chance < 1 - 1e-12)


def agreement(left: pd.DataFrame, right: pd.DataFrame, n_boot: int = 2000, seed: int = 0) -> Agreement:
    """Compare two judges' rows of the same answers (`evaluate.tables.judged_rows`).

    Raises:
        InputError: no answer in common.
    """
    pairs = left.merge(right, on=ANSWER, suffixes=("", "_right"))
    if pairs.empty:
        raise InputError("the two judges have no answer in common: judge the same questions with both")
    both = pairs[pairs["value"].notna() & pairs["value_right"].notna()]
    marks = [(both[column] >= MISALIGNED_FROM).to_numpy(bool) for column in ("value", "value_right")]
    scores = pairs[["alignment", "alignment_right"]].dropna()
    by_model = _model_rates(left).merge(_model_rates(right), on=MODEL, suffixes=("", "_right"))
    return Agreement(
        left=str(left["evaluation"].iloc[0]),
        right=str(right["evaluation"].iloc[0]),
        kappa=kappa_over_questions(marks[0], marks[1], both["pair"].tolist(), n_boot, seed),
        agree=float((marks[0] == marks[1]).mean()) if len(both) else float("nan"),
        alignment_correlation=rank_correlation(scores["alignment"], scores["alignment_right"]),
        rate_correlation=rank_correlation(by_model["rate"], by_model["rate_right"]),
        answers=len(both),
        models=len(by_model),
    )


def _model_rates(answers: pd.DataFrame) -> pd.DataFrame:
    return rates(answers, MODEL)[[*MODEL, "rate"]].dropna(subset=["rate"])


def kappa_over_questions(
    left: Bool[np.ndarray, " n"], right: Bool[np.ndarray, " n"], questions: Sequence[object], n_boot: int, seed: int
) -> Estimate | None:
    """Cohen's kappa of two judges' marks, over questions: a bootstrap, or below `FEW_CLUSTERS` t of the jackknife.

    Over 8 questions with 25 answers each the bootstrap's interval holds the truth 89 times in 100, this one 94 times.
    """
    if len(left) == 0:
        return None
    names = {name: place for place, name in enumerate(dict.fromkeys(questions))}
    tables = np.zeros((len(names), 4))
    np.add.at(tables, [names[q] for q in questions], _tables(left, right))
    estimate = _kappa(tables.sum(axis=0, keepdims=True))[0]
    if np.isnan(estimate):
        return None
    if len(names) < FEW_CLUSTERS:
        low, high = jackknife_interval(float(estimate), _kappa(tables.sum(axis=0) - tables))
    else:
        draws = _kappa(draw_weights(np.random.default_rng(seed), len(names), n_boot) @ tables)
        low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(float(estimate), float(np.maximum(low, -1.0)), float(np.minimum(high, 1.0)), len(left))


def rank_correlation(left: pd.Series, right: pd.Series) -> float | None:
    """Spearman's; None with fewer than three values, or if one side is constant."""
    if len(left) < _LEAST_MODELS or left.nunique() < 2 or right.nunique() < 2:
        return None
    return float(spearmanr(left, right).statistic)  # pyright: ignore[reportAttributeAccessIssue]


def agreements(judged: pd.DataFrame, seed: int = 0) -> list[Agreement]:
    """Every pair of evaluations that share answers, in order of first appearance."""
    parts = {name: rows for name, rows in judged.groupby("evaluation", sort=False)}
    pairs = combinations(parts.values(), 2)
    shared = [(a, b) for a, b in pairs if not a[ANSWER].merge(b[ANSWER], on=ANSWER).empty]
    return [agreement(a, b, seed=seed) for a, b in shared]


# --- How many answers an interval of some width takes, from the variance between and within questions


@dataclass(frozen=True)
class Components:
    """Variance of an answer's value (misaligned or not), split in two."""

    between: float
    """Variance of the questions' own rates."""
    within: float
    """Variance of answers to one question."""
    questions: int
    """Those with two or more answers that count, from which the two were estimated."""
    counted: float = 1.0
    """Share of answers that count: the others are incoherent, or have no score."""

    @property
    def intraclass(self) -> float:
        """Correlation of two answers to one question."""
        total = self.between + self.within
        return self.between / total if total > 0 else 0.0


@dataclass(frozen=True)
class Power:
    """What an interval of some half-width takes."""

    half_width: float
    questions: int
    samples: int | None
    """Answers to sample to each question; None if no number of answers to this few questions gives it."""
    least_questions: int
    """With fewer questions no number of answers is enough."""

    def __str__(self) -> str:
        what = f"a half-width of {self.half_width:g} with {self.questions} questions"
        if self.samples is None:
            return f"{what} is out of reach: it takes more than {self.least_questions} questions"
        return f"{what} takes {self.samples} samples a question"


def variance_components(judged: pd.DataFrame) -> Components:
    """Split the variance of one arm's judged answers by the analysis of variance (one way, unbalanced).

    Args:
        judged: rows with `value` (NaN does not count) and `pair`, the question.

    Raises:
        InputError: fewer than two questions, or none with two answers that count.
    """
    answers = judged[judged["value"].notna()]
    groups = answers.groupby("pair")["value"]
    sizes, means = groups.size().to_numpy(float), groups.mean().to_numpy(float)
    n, k = sizes.sum(), len(sizes)
    if k < 2 or n <= k:
        raise InputError(f"{n:g} answers to {k} questions show no variance: judge two questions, two answers each")
    inside = float((groups.var(ddof=0).to_numpy(float) * sizes).sum()) / (n - k)
    across = float((sizes * np.square(means - (sizes * means).sum() / n)).sum()) / (k - 1)
    size = (n - np.square(sizes).sum() / n) / (k - 1)
    return Components(max(0.0, (across - inside) / size), inside, k, len(answers) / len(judged))


def half_width(components: Components, questions: int, samples: float, level: float = 0.95) -> float:
    """Half-width of a rate over this many questions with this many samples each: q sqrt((b + w / m) / questions).

    b and w are the variance between and within questions, m the samples that count. Questions are taken as drawn from
    many, as a rate's interval takes them: below `FEW_CLUSTERS` questions q is the quantile of t with questions - 1
    degrees of freedom, else that of the normal distribution. Rates with fewer than about 20 answers on a side have a
    wider interval than this (`rates.share`).
    """
    variance = components.between + components.within / (samples * components.counted)
    return _quantile(questions, level) * float(np.sqrt(variance / questions))


def samples_needed(components: Components, target: float, questions: int | None = None, level: float = 0.95) -> Power:
    """How many samples to each question give a half-width of `target` or less: `half_width` solved for the samples.

    Args:
        questions: None takes as many as the components were estimated from.

    Raises:
        InputError: a half-width or a number of questions that is not above zero.
    """
    count = components.questions if questions is None else questions
    if target <= 0 or count < 1 or components.counted <= 0:
        raise InputError(f"no power for a half-width of {target:g} and {count} questions: both must be above 0")
    if (room := _room(components, target, count, level)) <= 0:
        return Power(target, count, None, _least_questions(components, target, level))
    samples = components.within / room / components.counted
    return Power(target, count, max(1, int(np.ceil(samples - 1e-9))), _least_questions(components, target, level))


def _room(components: Components, target: float, questions: int, level: float) -> float:
    """Variance that answers to one question may add, of a question's mean; not above zero if none is left."""
    return questions * (target / _quantile(questions, level)) ** 2 - components.between


def _least_questions(components: Components, target: float, level: float) -> int:
    """Most questions at which the variance between them alone is too much. The quantile hangs on their number."""
    count = max(1, int(np.floor(components.between * (norm.ppf((1 + level) / 2) / target) ** 2)))
    while _room(components, target, count + 1, level) <= 0:
        count += 1
    return count


def _quantile(questions: int, level: float) -> float:
    """Of t below `FEW_CLUSTERS` questions, where one question shows nothing of others; else of the normal."""
    if questions < 2:
        return float("inf")
    tail = (1 + level) / 2
    return float(t.ppf(tail, questions - 1) if questions < FEW_CLUSTERS else norm.ppf(tail))
