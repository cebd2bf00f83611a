"""Directions that are not latents, compared with latents on equal terms: the mean difference and a logistic probe."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from persona_probe.errors import InputError
from persona_probe.latents.rankers import mean_difference
from persona_probe.saes.read import LatentMeans
from persona_probe.stats import auroc


@dataclass(frozen=True)
class NamedDirection:
    """A direction in the residual stream, named by its method instead of a latent's number."""

    name: str
    vector: Float[np.ndarray, " d_model"]
    """Points to misaligned, in raw units of the residual stream; a probe's is in log-odds per raw unit."""
    paper: str
    """The method's source."""
    held_out: float | None = None
    """AUROC between misaligned and aligned answers to held-out questions; None if it was not measured."""


def mean_difference_direction(tuned: LatentMeans, control: LatentMeans) -> NamedDirection:
    """`rankers.mean_difference` of two models on the same conversations, as a named direction."""
    paper = "Soligo, Turner et al. 2025, arXiv 2506.11618"
    return NamedDirection("mean difference", mean_difference(tuned, control), paper)


def logistic_probe(
    misaligned_resid: Float[np.ndarray, "misaligned d_model"],
    aligned_resid: Float[np.ndarray, "aligned d_model"],
    clusters: Sequence[str],
    aligned_clusters: Sequence[str] | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
) -> NamedDirection:
    """The weights of a logistic regression between misaligned and aligned answers (Alain & Bengio 2016).

    The fit is L2-regularised on standardised features; the weights are mapped back to raw units. Cross-validation that
    keeps all answers to a question in one fold chooses the penalty. `held_out` is the AUROC on whole held-out
    questions. Inside each fold the penalty is chosen again from the training questions, so the score never uses the
    held-out ones.

    The weights are a filter: they turn away from correlated noise and need not resemble the mean difference (Haufe et
    al. 2014). They tell how to read the persona, not how the model writes it.

    Args:
        misaligned_resid: mean residual of each misaligned answer (`response_means`, or `LatentMeans.resid`).
        aligned_resid: the same of each aligned answer.
        clusters: the question of each misaligned answer.
        aligned_clusters: the question of each aligned answer; None if they are the same questions in the same order.
        folds: how many folds of whole questions.
        seed: decides which questions share a fold.

    Raises:
        InputError: counts or widths differ, a value is not finite, fewer questions than folds, or training questions
            without both kinds of answers.
    """
    names = [*clusters, *(clusters if aligned_clusters is None else aligned_clusters)]
    x, y = _stack(misaligned_resid, aligned_resid, names, len(clusters))
    held_out = held_out_auroc(x, y, names, folds, seed)
    fit = fit_path(x, y, [choose_strength(x, y, names, folds, seed)])[0]
    return NamedDirection("logistic probe", fit.weights, "Alain & Bengio 2016, arXiv 1610.01644", held_out)


def _stack(
    misaligned: Float[np.ndarray, "misaligned d_model"],
    aligned: Float[np.ndarray, "aligned d_model"],
    names: list[str],
    n_misaligned: int,
) -> tuple[Float[np.ndarray, "n d_model"], Bool[np.ndarray, " n"]]:
    if (len(misaligned), len(aligned)) != (n_misaligned, len(names) - n_misaligned):
        raise InputError(
            f"{len(misaligned)} misaligned and {len(aligned)} aligned answers, but {n_misaligned} and "
            f"{len(names) - n_misaligned} questions: name one for each answer (aligned_clusters where they differ)"
        )
    if misaligned.shape[1:] != aligned.shape[1:]:
        raise InputError(f"widths differ: {misaligned.shape[1:]} and {aligned.shape[1:]}; read both at one layer")
    x = np.concatenate([misaligned, aligned]).astype(np.float64)
    if not np.isfinite(x).all():
        raise InputError("the residuals have values that are not finite: check the model's precision")
    return x, np.arange(len(x)) < n_misaligned


# --- L2-regularised logistic regression; held-out questions choose its penalty and measure its quality

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""L2 penalties to try, on standardised features and the mean log-loss."""


@dataclass(frozen=True)
class Linear:
    """A linear score in raw units: `x @ weights + bias`, the log-odds of the positive class."""

    weights: Float[np.ndarray, " features"]
    bias: float

    def scores(self, x: Float[np.ndarray, "n features"]) -> Float[np.ndarray, " n"]:
        """Log-odds of each row."""
        return x @ self.weights + self.bias


def grouped_folds(clusters: Sequence[str], folds: int, seed: int = 0) -> Int[np.ndarray, " n"]:
    """A fold number for every row. All rows of a cluster (a question) share one; clusters are dealt evenly.

    Raises:
        InputError: fewer than two folds, or fewer clusters than folds.
    """
    # sklearn's GroupKFold deals groups by their size; a seed decides here, and records were made with these folds.
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    if not 2 <= folds <= len(names):
        raise InputError(f"{folds} folds for {len(names)} questions: use at least 2 folds and as many questions")
    fold_of = np.arange(len(names)) % folds
    np.random.default_rng(seed).shuffle(fold_of)
    return fold_of[[names[c] for c in clusters]]


def fit_path(x: Float[np.ndarray, "n features"], y: Bool[np.ndarray, " n"], strengths: Sequence[float]) -> list[Linear]:
    """One fit for each penalty: mean log-loss + strength / 2 x squared norm of the weights, without the bias.

    Features are standardised for the fit, and the weights are mapped back to raw units. Constant features get weight 0.

    Raises:
        InputError: rows of one class only.
    """
    from sklearn.linear_model import LogisticRegression

    if y.all() or not y.any():
        raise InputError("a logistic fit needs both classes: give more questions, with both kinds of answers")
    mean, spread = x.mean(axis=0), x.std(axis=0)
    scale = np.where(spread > 1e-8 * max(1e-30, spread.max()), spread, np.inf)
    # The solution lies in the span of the rows, so n coordinates instead of d_model give it exactly.
    left, sizes, basis = np.linalg.svd((x - mean) / scale, full_matrices=False)
    model, fits = LogisticRegression(tol=1e-7, max_iter=2000, warm_start=True), dict[float, Linear]()
    for strength in sorted(strengths, reverse=True):  # each fit starts from the one with the next stronger penalty
        model.set_params(C=1 / (len(y) * strength)).fit(left * sizes, y)
        weights = (model.coef_[0] @ basis) / scale
        fits[strength] = Linear(weights, float(np.ravel(model.intercept_)[0] - weights @ mean))
    return [fits[strength] for strength in strengths]


def choose_strength(
    x: Float[np.ndarray, "n features"],
    y: Bool[np.ndarray, " n"],
    clusters: Sequence[str],
    folds: int,
    seed: int = 0,
    strengths: Sequence[float] = STRENGTHS,
) -> float:
    """The penalty with the lowest log-loss on held-out questions (the log-loss still differs when every AUROC is 1)."""
    sign, totals = np.where(y, 1.0, -1.0), np.zeros(len(strengths))
    for train, test in splits(clusters, folds, seed):
        for i, fit in enumerate(fit_path(x[train], y[train], strengths)):
            totals[i] += np.logaddexp(0, -sign[test] * fit.scores(x[test])).sum()
    return strengths[int(totals.argmin())]


def held_out_auroc(
    x: Float[np.ndarray, "n features"], y: Bool[np.ndarray, " n"], clusters: Sequence[str], folds: int, seed: int = 0
) -> float:
    """Mean AUROC over folds of whole questions; in each fold only the training questions choose the penalty.

    Raises:
        InputError: too few questions, no fold holds both classes, or the training questions of one lack a class.
    """
    names, values = np.array(clusters), []
    for train, test in splits(clusters, folds, seed):
        inner = min(folds, len(set(names[train])))
        if inner < 2:
            raise InputError("too few questions for a held-out score: give at least 4")
        strength = choose_strength(x[train], y[train], names[train].tolist(), inner, seed)
        scores = fit_path(x[train], y[train], [strength])[0].scores(x[test])
        if y[test].any() and not y[test].all():
            values.append(auroc(scores[y[test]], scores[~y[test]]))
    if not values:
        raise InputError("no held-out fold has both kinds of answers: give questions with both, or fewer folds")
    return float(np.mean(values))


def splits(
    clusters: Sequence[str], folds: int, seed: int = 0
) -> Iterator[tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
    """Masks (train, test) of each fold; a question is never on both sides."""
    fold = grouped_folds(clusters, folds, seed)
    for number in range(folds):
        yield fold != number, fold == number
