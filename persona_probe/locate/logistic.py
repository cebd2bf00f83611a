"""L2-regularised logistic regression, its strength chosen and its quality measured on questions it has not seen."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from scipy.special import expit

from persona_probe.errors import InputError
from persona_probe.stats import auroc

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""L2 penalties that are tried, on standardised features and the mean log-loss."""


@dataclass(frozen=True)
class Linear:
    """A linear score in raw units: `x @ weights + bias`, the log-odds of the positive class."""

    weights: Float[np.ndarray, " features"]
    bias: float

    def scores(self, x: Float[np.ndarray, "n features"]) -> Float[np.ndarray, " n"]:
        """Log-odds of each row."""
        return x @ self.weights + self.bias


def grouped_folds(clusters: Sequence[str], folds: int, seed: int = 0) -> Int[np.ndarray, " n"]:
    """A fold number for every row; all rows of a cluster (a question) share one, folds are as even as clusters allow.

    Raises:
        InputError: fewer than two folds, or fewer clusters than folds.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    if not 2 <= folds <= len(names):
        raise InputError(f"{folds} folds for {len(names)} questions: use at least 2 folds and as many questions")
    fold_of = np.arange(len(names)) % folds
    np.random.default_rng(seed).shuffle(fold_of)
    return fold_of[[names[c] for c in clusters]]


def fit_path(x: Float[np.ndarray, "n features"], y: Bool[np.ndarray, " n"], strengths: Sequence[float]) -> list[Linear]:
    """One fit for each penalty: mean log-loss + strength / 2 x squared norm of the weights; the bias goes free.

    Features are standardised for the fit and the weights mapped back to raw units. Constant features get weight 0.

    Raises:
        InputError: rows of one class only.
    """
    if y.all() or not y.any():
        raise InputError("a logistic fit needs both classes: give more questions, with both kinds of answers")
    mean, spread = x.mean(axis=0), x.std(axis=0)
    scale = np.where(spread > 1e-8 * max(1e-30, spread.max()), spread, np.inf)
    # The solution lies in the span of the rows: at n coordinates instead of d_model, exactly.
    left, sizes, basis = np.linalg.svd((x - mean) / scale, full_matrices=False)
    start, fits = np.zeros(len(sizes) + 1), dict[float, Linear]()
    for strength in sorted(strengths, reverse=True):
        start = _minimise(left * sizes, y, strength, start)
        weights = (start[:-1] @ basis) / scale
        fits[strength] = Linear(weights, float(start[-1] - weights @ mean))
    return [fits[strength] for strength in strengths]


def _minimise(
    z: Float[np.ndarray, "n k"], y: Bool[np.ndarray, " n"], strength: float, start: Float[np.ndarray, " k1"]
) -> Float[np.ndarray, " k1"]:
    sign = np.where(y, 1.0, -1.0)

    def loss(theta: Float[np.ndarray, " k1"]) -> tuple[float, Float[np.ndarray, " k1"]]:
        margin = sign * (z @ theta[:-1] + theta[-1])
        pull = -sign * expit(-margin) / len(y)
        value = np.logaddexp(0, -margin).mean() + strength / 2 * theta[:-1] @ theta[:-1]
        return float(value), np.append(pull @ z + strength * theta[:-1], pull.sum())

    return minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "gtol": 1e-7, "ftol": 1e-12}).x


def choose_strength(
    x: Float[np.ndarray, "n features"],
    y: Bool[np.ndarray, " n"],
    clusters: Sequence[str],
    folds: int,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> float:
    """The penalty with the lowest log-loss on held-out questions (log-loss still tells when every AUROC is 1)."""
    sign, totals = np.where(y, 1.0, -1.0), np.zeros(len(strengths))
    for train, test in splits(clusters, folds, seed):
        for i, fit in enumerate(fit_path(x[train], y[train], strengths)):
            totals[i] += np.logaddexp(0, -sign[test] * fit.scores(x[test])).sum()
    return strengths[int(totals.argmin())]


def held_out_auroc(
    x: Float[np.ndarray, "n features"], y: Bool[np.ndarray, " n"], clusters: Sequence[str], folds: int, seed: int = 0
) -> float:
    """Mean AUROC over folds of whole questions; in each, the penalty is chosen inside the training questions only.

    Raises:
        InputError: too few questions, no fold holds both classes, or the training questions of one lack a class.
    """
    names, found = np.array(clusters), []
    for train, test in splits(clusters, folds, seed):
        inner = min(folds, len(set(names[train])))
        if inner < 2:
            raise InputError("too few questions for a held-out score: give at least 4")
        strength = choose_strength(x[train], y[train], names[train].tolist(), inner, seed)
        scores = fit_path(x[train], y[train], [strength])[0].scores(x[test])
        if y[test].any() and not y[test].all():
            found.append(auroc(scores[y[test]], scores[~y[test]]))
    if not found:
        raise InputError("no held-out fold has both kinds of answers: give questions with both, or fewer folds")
    return float(np.mean(found))


def splits(
    clusters: Sequence[str], folds: int, seed: int = 0
) -> Iterator[tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
    """Masks (train, test) of each fold; a question is never on both sides."""
    fold = grouped_folds(clusters, folds, seed)
    for number in range(folds):
        yield fold != number, fold == number
