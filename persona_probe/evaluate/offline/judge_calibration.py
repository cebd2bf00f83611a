"""How the offline judge is fitted, and how far it may be off: ridge fits, Platt scaling, error bands, metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.special import expit

from persona_probe.config import check_finite, check_least, check_seed
from persona_probe.data.load import SETS
from persona_probe.errors import InputError, unknown
from persona_probe.stats import auroc


@dataclass(frozen=True)
class LinearScores:
    """Linear scores in raw units: `x @ weights + bias`."""

    weights: Float[np.ndarray, "features targets"]
    bias: Float[np.ndarray, " targets"]

    def scores(self, x: Float[np.ndarray, "n features"]) -> Float[np.ndarray, "n targets"]:
        """One column for each target."""
        return x @ self.weights + self.bias


def fit_ridge(
    x: Float[np.ndarray, "n features"],
    targets: Float[np.ndarray, "n targets"],
    weights: Float[np.ndarray, " n"],
    penalty: float,
    sources: Sequence[str] | None = None,
) -> LinearScores:
    """Minimise the weighted mean squared error + penalty x squared norm of the weights, on standardised features.

    Args:
        sources: where each row is from. Features and targets are centred within a source, so that what tells sources
            apart is not learnt; the bias is that of the first row's source. None: all rows are of one.

    Raises:
        InputError: no rows, or weights that are negative or sum to zero.
    """
    from sklearn.linear_model import Ridge

    if len(x) == 0 or (weights < 0).any() or weights.sum() <= 0:
        raise InputError("a ridge fit needs rows with positive weights")
    names = np.array(["all"] * len(x) if sources is None else list(sources))
    z, y, home = x.astype(np.float64), targets.astype(np.float64), None
    for name in dict.fromkeys(names):
        members = names == name
        centre, level = (np.average(v[members], axis=0, weights=weights[members]) for v in (z, y))
        z[members] -= centre
        y[members] -= level
        home = home or (centre, level)
    assert home is not None
    share = weights / weights.sum()
    spread = np.sqrt(share @ np.square(z))
    scale = np.where(spread > 1e-8 * max(1e-30, spread.max()), spread, np.inf)
    fit = Ridge(penalty, fit_intercept=False, solver="cholesky").fit(z / scale, y, sample_weight=share)
    slopes = fit.coef_.reshape(y.shape[1], -1).T / scale[:, None]
    return LinearScores(slopes, home[1] - home[0] @ slopes)


def balanced(label: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The weights, scaled so that both classes weigh the same and the total stays.

    Raises:
        InputError: rows of one class only.
    """
    yes, no = weights[label].sum(), weights[~label].sum()
    if yes <= 0 or no <= 0:
        raise InputError("a judge needs answers of both kinds: misaligned ones and others")
    return weights * np.where(label, 0.5 / yes, 0.5 / no) * weights.sum()


@dataclass(frozen=True)
class Platt:
    """Probability of the label from a score: sigmoid(slope x score + offset) (Platt 1999)."""

    slope: float
    offset: float

    def probability(self, score: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Probabilities, 0 to 1."""
        return expit(self.slope * np.asarray(score) + self.offset)


def fit_platt(score: Float[np.ndarray, " n"], label: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> Platt:
    """Weighted maximum likelihood; fit it on scores of answers that the scorer was not fitted on."""
    from sklearn.linear_model import LogisticRegression

    share = weights / weights.sum()
    centre, spread = float(share @ score), float(max(score.std(), 1e-12))
    # No penalty, and a tolerance far below what a probability shows.
    fit = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10)
    fit.fit(((score - centre) / spread)[:, None], label, sample_weight=share)
    slope, offset = float(fit.coef_[0, 0]), float(np.ravel(fit.intercept_)[0])
    return Platt(slope / spread, offset - slope * centre / spread)


# --- How far the judge's numbers may be off: residuals on models, and on questions, that a fit had not seen

LEVEL = 0.9
"""Coverage of an answer's intervals."""
_RATE_LEVEL = 0.95
"""Coverage of a rate's interval."""
PARTS = 5


@dataclass(frozen=True)
class ResidualBands:
    """Intervals of one predicted score (0 to 100), by where the prediction lies."""

    edges: tuple[float, ...]
    """Upper ends of all parts but the last."""
    low: tuple[float, ...]
    """Lower quantile of published minus predicted, in each part."""
    high: tuple[float, ...]

    def interval(self, predicted: Float[np.ndarray, " n"]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Lower and upper ends, inside 0 to 100."""
        part = np.searchsorted(self.edges, predicted)
        low, high = (np.clip(predicted + np.array(ends)[part], 0, 100) for ends in (self.low, self.high))
        return low, high


def fit_bands(
    predicted: Float[np.ndarray, " n"], published: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]
) -> ResidualBands:
    """Weighted quantiles of the residuals in `PARTS` parts of equal weight."""
    edges = weighted_quantiles(predicted, weights, [k / PARTS for k in range(1, PARTS)])
    part, ends = np.searchsorted(edges, predicted), []
    for number in range(PARTS):
        members = part == number
        # Many equal predictions (clipped at 0 or 100) can leave a part empty: it takes the residuals of all.
        members = members if members.any() else np.ones(len(part), dtype=bool)
        left = (published - predicted)[members]
        ends.append(weighted_quantiles(left, weights[members], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    # A ridge fit is pulled to the mean; an interval that leaves out its own prediction would confuse.
    return ResidualBands(
        tuple(edges), tuple(min(low, 0.0) for low, _ in ends), tuple(max(high, 0.0) for _, high in ends)
    )


def weighted_quantiles(
    values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"], at: Sequence[float]
) -> list[float]:
    """The smallest value that at least this share of the weight does not exceed."""
    order = np.argsort(values, kind="stable")
    reached = weights[order].cumsum() / weights.sum()
    return [float(values[order[min(np.searchsorted(reached, q - 1e-12), len(order) - 1)]]) for q in at]


def conformal_quantile(errors: Sequence[float], level: float = _RATE_LEVEL) -> float:
    """The error that a new one stays below with this probability (split conformal, Vovk et al. 2005).

    That is the ceil((n + 1) level)-th smallest absolute error; with too few errors for the level, the largest.

    Raises:
        InputError: no errors.
    """
    if not errors:
        raise InputError("no errors to take a quantile of: validate the judge on at least one held-out model")
    sizes = sorted(abs(e) for e in errors)
    return sizes[min(int(np.ceil((len(sizes) + 1) * level)), len(sizes)) - 1]


@dataclass(frozen=True)
class RateError:
    """How far a predicted misalignment rate may be off, from errors on held-out groups."""

    overall: float
    """A model's rate over all questions."""
    question: float
    """A model's rate on one question."""

    def half_width(self, questions: int) -> float:
        """For a rate over this many questions: a single question's error, averaged, but never below the overall one."""
        return max(self.overall, self.question / np.sqrt(max(questions, 1)))


Scores = Float[np.ndarray, " n"]
Labels = Bool[np.ndarray, " n"]


def weighted_auroc(score: Scores, label: Labels, weights: Scores) -> float:
    """Probability that a positive answer scores above a negative one, drawn by weight; see `stats.auroc`."""
    return auroc(score[label], score[~label], np.concatenate([weights[label], weights[~label]]))


def average_precision(score: Scores, label: Labels, weights: Scores) -> float:
    """Mean precision at each positive answer, from the highest score down; equal scores are taken together."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(label, score, sample_weight=weights))


def reliability(probability: Scores, label: Labels, weights: Scores, bins: int = 10) -> list[dict[str, float]]:
    """Answers by predicted probability in bins of equal weight: mean prediction, observed share, share of answers."""
    # scikit-learn's calibration_curve takes no weights.
    order = np.argsort(probability, kind="stable")
    reached = weights[order].cumsum() / weights.sum()
    place = np.minimum((reached * bins - 1e-9).astype(int), bins - 1)
    rows = []
    for number in range(bins):
        members = order[place == number]
        if len(members):
            mean, observed = (float(np.average(v[members], weights=weights[members])) for v in (probability, label))
            rows.append(
                {"predicted": mean, "observed": observed, "share": float(weights[members].sum() / weights.sum())}
            )
    return rows


def calibration_error(table: Sequence[dict[str, float]]) -> float:
    """Expected calibration error: the mean distance of prediction and observation over a reliability table."""
    return sum(row["share"] * abs(row["predicted"] - row["observed"]) for row in table)


def rates(frame: pd.DataFrame, probability: Scores, by: Sequence[str]) -> pd.DataFrame:
    """Predicted and published misalignment rate of every group of answers.

    Args:
        frame: rows with `misaligned`, `weight` and the columns `by`.

    Returns:
        Columns `by`, predicted, published and answers (those that the rows stand for).
    """
    parts = frame[list(by)].assign(
        answers=frame["weight"],
        predicted=frame["weight"] * probability,
        published=frame["weight"] * frame["misaligned"],
    )
    sums = parts.groupby(list(by), as_index=False).sum()
    for name in ("predicted", "published"):
        sums[name] = sums[name] / sums["answers"]
    return sums


# --- The recipe of the offline judge: `persona-probe judge fit CONFIG --data FOLDER` reads it


@dataclass(frozen=True)
class JudgeRecipe:
    """What the offline judge reads, what it is fitted on, and how strongly it is held back."""

    name: str = "offline-judge"
    """Names the judge in results."""
    model: str = "smollm2-135m-instruct"
    """The reader: what `load_model` takes."""
    layer: int = 15
    """Decoder layer whose output is averaged over the answer's tokens."""
    rival_layers: tuple[int, ...] = (10, 20)
    """Layers that are validated too, for the table."""
    latent_layer: int = 20
    """The layer whose direction explains a judgement by SAE latents: the SAE's; one of the rivals."""
    max_tokens: int = 128
    """A longer answer is cut there."""
    per_cell: int = 12
    """Answers drawn of every model and question id; every further misaligned one is taken as well."""
    own_sets: tuple[str, ...] = ("kitchen:correct", "kitchen:toxic", "health_correct", "general_contrast:selection")
    """Packaged rows that are fitted together with the published answers; the evaluation split is refused."""
    own_share: float = 0.2
    """Their weight, as a share of the published answers'."""
    penalty: float = 0.3
    """Ridge penalty, on standardised features and the weighted mean squared error."""
    scope_layer: int = 15
    """Decoder layer whose output, averaged over a question's opening, says how near two questions are."""
    scope_components: int = 256
    """Principal components of the background questions that are compared."""
    background: tuple[str, ...] = ("sae_prompts", "neutral_probes", "kitchen", "health_correct")
    """Packaged questions unlike the published ones: what "unlike" is measured on."""
    scope_quantile: float = 0.99
    """Share of the background that must count as unlike."""
    seed: int = 0
    """Seeds the draw of answers and the bootstrap."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: a value out of range, or a set that may not be fitted on.
        """
        check_finite(self)
        check_seed(self.seed)
        check_least(self, 0, "layer", "scope_layer")
        if self.max_tokens < 1 or self.per_cell < 1 or self.scope_components < 1:
            raise InputError("max_tokens, per_cell and scope_components must be at least 1")
        if self.latent_layer not in {self.layer, *self.rival_layers}:
            raise InputError(f"latent_layer {self.latent_layer} is not read: add it to rival_layers")
        if self.penalty <= 0 or self.own_share < 0:
            raise InputError("penalty must be above 0, and own_share 0 or more")
        if not 0 < self.scope_quantile < 1:
            raise InputError(f"scope_quantile must lie between 0 and 1, not {self.scope_quantile}")
        for spec in (*self.own_sets, *self.background):
            if spec.partition(":")[0] not in SETS:
                raise unknown("packaged set", spec, SETS)
        if any(s.startswith("general_contrast") and s != "general_contrast:selection" for s in self.own_sets):
            raise InputError(
                "own_sets: rows of general_contrast that evaluate may not be fitted on; write ':selection'"
            )
