"""Intervals and tests: clustered bootstrap and t, Benjamini-Hochberg, AUROC, exact intervals of counts. Seeded."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from scipy.stats import beta, chi2, norm, rankdata, t

from persona_probe.errors import InputError

Values = Sequence[float] | Float[np.ndarray, " n"]

_COLUMNS_AT_ONCE = 8192
"""Columns that are resampled at once: memory is this many times the number of draws."""
_TINY = 1e-9
FEW_CLUSTERS = 30
"""With fewer clusters a percentile bootstrap is too narrow, and means get a t interval; see `bootstrap_mean`."""
INTRACLASS = 0.5
"""Correlation of two answers to one question that is assumed where the answers cannot show it; see `grouped_size`."""
NO_INTERVAL = "one question: no interval"
"""What is printed in place of the ends where a single cluster has none."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval and the count of items behind it."""

    estimate: float
    ci_low: float
    ci_high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """As plain JSON values."""
        return asdict(self)

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.ci_low > 0 or self.ci_high < 0

    def __str__(self) -> str:
        return estimate_text(self.estimate, self.ci_low, self.ci_high)


def number_text(value: float | None, form: str, missing: str = "-") -> str:
    """A number in a format like `.3g`; `missing` for None and NaN."""
    return missing if value is None or value != value else f"{value:{form}}"


def estimate_text(
    estimate: float | None, low: float | None, high: float | None, form: str = "+.3f", missing: str = "-"
) -> str:
    """A number with its interval, `+0.310 [+0.220, +0.400]`; `missing` for None and NaN, `NO_INTERVAL` without ends."""
    if estimate is None or estimate != estimate:
        return missing
    return f"{estimate:{form}} {ends_text(low, high, form)}"


def ends_text(low: float | None, high: float | None, form: str = "+.3f") -> str:
    """The ends of an interval, `[+0.220, +0.400]`; `(one question: no interval)` where there is none."""
    if low is None or high is None or low != low or high != high:
        return f"({NO_INTERVAL})"
    return f"[{low:{form}}, {high:{form}}]"


def bootstrap_mean(
    values: Values,
    clusters: Sequence[object] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
    rate: bool = False,
) -> Estimate:
    """Mean with its interval over whole clusters: percentile bootstrap (Efron 1979), or t where clusters are few.

    Below `FEW_CLUSTERS` clusters the bootstrap covers too little (a 95% interval of 8 clusters 87% of the time, see
    `make coverage`), and the interval is t with the cluster-robust error of sum over count and G - 1 degrees of
    freedom, G being the number of clusters. A single cluster has no interval: its ends are NaN.

    Args:
        values: one number an item; for a paired effect pass the items' differences.
        clusters: what the items are nested in (question, say); None means that each item is its own cluster.
        level: coverage of the interval.
        rate: the values are shares of 0 to 1. The interval then stays in that range, and where all values are 0 or
            all are 1 it is the exact one of Clopper and Pearson with `grouped_size` as n. Without `rate` a constant
            has a point: a model minus itself is zero.

    Raises:
        InputError: no values, a value that is not finite, or `clusters` of another length.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise InputError("no values to average: the selection is empty")
    if not np.isfinite(array).all():
        raise InputError(f"{(~np.isfinite(array)).sum()} of {array.size} values are not finite")
    sums, counts = _cluster_totals(array, clusters)
    mean, groups = float(array.mean()), len(counts)
    if rate and (not array.any() or (array == 1).all()):
        size = grouped_size(counts)
        return Estimate(mean, *clopper_pearson(size * mean, size, level), int(array.size))
    if groups < FEW_CLUSTERS:
        half = float(_t_half_width(sums[:, None], counts, level)[0])
        low, high = mean - half, mean + half
    else:
        rng = np.random.default_rng(seed)
        draws = rng.integers(0, groups, size=(n_boot, groups))
        means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
        low, high = (float(end) for end in np.quantile(means, [(1 - level) / 2, (1 + level) / 2]))
    if rate and low == low:
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(mean, low, high, int(array.size))


def _t_half_width(sums: np.ndarray, counts: np.ndarray, level: float) -> Float[np.ndarray, " columns"]:
    """Quantile of t times the cluster-robust error of sum over count, by column; NaN for one cluster."""
    groups = len(counts)
    if groups < 2:
        return np.full(sums.shape[1], np.nan)
    return t.ppf((1 + level) / 2, groups - 1) * _robust_error(sums, counts)


def _robust_error(sums: np.ndarray, counts: np.ndarray) -> Float[np.ndarray, " columns"]:
    """Cluster-robust error of sum over count (Liang and Zeger 1986), with the factor G / (G - 1)."""
    groups, items = len(counts), counts.sum()
    residual = sums - counts[:, None] * (sums.sum(axis=0) / items)
    # A constant leaves rounding errors as residuals: they are no spread.
    residual[np.abs(residual) <= 1e-12 * np.abs(sums).max(axis=0, initial=0.0)] = 0.0
    return np.sqrt(np.square(residual).sum(axis=0) * groups / (groups - 1)) / items


def paired_difference(
    left: Values, right: Values, clusters: Sequence[object] | None = None, n_boot: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of `left - right` over the same items, with the clustered interval of `bootstrap_mean`.

    Raises:
        InputError: the two sides differ in length.
    """
    a, b = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if a.shape != b.shape:
        raise InputError(f"paired values differ in length: {a.size} and {b.size}; give the same items on both sides")
    return bootstrap_mean(a - b, clusters, n_boot, seed)


def bootstrap_statistic(
    values: Values, statistic: Callable[[np.ndarray], float], n_boot: int = 2000, seed: int = 0
) -> Estimate:
    """Any statistic of independent values (a quantile, say) with its percentile bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise InputError("no values for a statistic: the selection is empty")
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, array.size, size=(n_boot, array.size))
    results = np.array([statistic(array[d]) for d in draws])
    low, high = np.quantile(results, [0.025, 0.975])
    return Estimate(float(statistic(array)), float(low), float(high), int(array.size))


def jackknife_interval(estimate: float, without: Values, level: float = 0.95) -> tuple[float, float]:
    """Interval of a smooth statistic from its values without each cluster in turn: the jackknife with t (Tukey 1958).

    Args:
        estimate: the statistic of all clusters.
        without: the statistic without each cluster. A value that is not finite, or a single cluster, leaves no
            interval (NaN): the statistic rests on one cluster.
    """
    values = np.asarray(without, dtype=np.float64)
    if values.size < 2 or not np.isfinite(values).all():
        return float("nan"), float("nan")
    error = sqrt((values.size - 1) * float(values.var()))
    half = float(t.ppf((1 + level) / 2, values.size - 1)) * error
    return estimate - half, estimate + half


def bootstrap_columns(
    values: Float[np.ndarray, "items columns"],
    clusters: Sequence[object] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]]:
    """Intervals for the mean of every column over whole clusters, as in `bootstrap_mean`: t where clusters are few.

    All columns share their draws. A column of zeros has a point.

    Returns:
        Lower and upper ends.

    Raises:
        InputError: no items, or `clusters` of another length.
    """
    sums, counts = _cluster_totals(_columns(values), clusters)
    n = len(counts)
    if n < FEW_CLUSTERS:
        middle, half = sums.sum(axis=0) / counts.sum(), _t_half_width(sums, counts, level)
        return middle - half, middle + half
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=n_boot).astype(np.float64)
    ends = [(1 - level) / 2, (1 + level) / 2]
    bounds = np.zeros((2, sums.shape[1]))
    # Most latents of a large dictionary are silent: the interval of a column of zeros is a point.
    moving = np.flatnonzero(sums.any(axis=0))
    for start in range(0, len(moving), _COLUMNS_AT_ONCE):
        part = moving[start : start + _COLUMNS_AT_ONCE]
        # Draws in the last axis: quantiles are found faster where they lie side by side.
        means = (sums[:, part].T @ weights.T) / (weights @ counts)
        bounds[:, part] = np.quantile(means, ends, axis=1, overwrite_input=True)
    return bounds[0], bounds[1]


def clustered_p_values(
    values: Float[np.ndarray, "items columns"], clusters: Sequence[object] | None = None
) -> Float[np.ndarray, " columns"]:
    """Two-sided p of the mean of every column being zero: t with the cluster-robust error (Liang and Zeger 1986).

    The error is that of the mean over items, the same mean that `bootstrap_columns` bounds, with the small-sample
    factor G / (G - 1) and G - 1 degrees of freedom for G clusters. With clusters of one size this is the one-sample t
    test on cluster means. A bootstrap p cannot fall below one over the number of draws, which is too coarse once
    thousands of columns are corrected for; t has no such floor. A column of zeros, or a single cluster, gives 1.

    Raises:
        InputError: no items, or `clusters` of another length.
    """
    size, groups = clustered_t(values, clusters)
    return 2 * t.sf(np.abs(size), groups - 1) if groups > 1 else np.ones(len(size))


def clustered_t(
    values: Float[np.ndarray, "items columns"], clusters: Sequence[object] | None = None
) -> tuple[Float[np.ndarray, " columns"], int]:
    """Mean of every column over its cluster-robust error, and the number of clusters; see `clustered_p_values`.

    Zero for a column of zeros, and where there is only one cluster.
    """
    array = _columns(values)
    sums, counts = _cluster_totals(array, clusters)
    groups, mean = len(counts), array.mean(axis=0)
    if groups < 2:
        return np.zeros(array.shape[1]), groups
    error = _robust_error(sums, counts)
    certain = np.where(mean == 0, 0.0, np.copysign(np.inf, mean))
    return np.divide(mean, error, out=certain, where=error > 0), groups


def benjamini_hochberg(p_values: Values) -> Float[np.ndarray, " n"]:
    """q-values: the smallest false discovery rate at which each test is a discovery (Benjamini and Hochberg 1995).

    Raises:
        InputError: a p-value outside 0 to 1, or not a number.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise InputError(f"{(~((p >= 0) & (p <= 1))).sum()} of {p.size} p-values are not between 0 and 1")
    order = np.argsort(p, kind="stable")
    scaled = p[order] * p.size / np.arange(1, p.size + 1)
    q = np.empty_like(p)
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1.0)
    return q


def _columns(values: Float[np.ndarray, "items columns"]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        raise InputError("no values to average: the selection is empty")
    return array


def _cluster_totals(array: np.ndarray, clusters: Sequence[object] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums over the first axis and item counts, by cluster, in order of first appearance."""
    if clusters is None:
        return array, np.ones(len(array))
    if len(clusters) != len(array):
        raise InputError(f"{len(array)} values but {len(clusters)} cluster names")
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    codes = np.array([names[c] for c in clusters])
    counts = np.bincount(codes)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.add.reduceat(array[np.argsort(codes, kind="stable")], starts, axis=0), counts.astype(np.float64)


# --- How well a score separates two classes


def auroc(positive: Values, negative: Values, weights: Values | None = None) -> float:
    """Probability that a positive value exceeds a negative one, ties counted half (Mann-Whitney U / n1 n2).

    Args:
        weights: one for each value, those of the positive values first; None counts every value once.

    Raises:
        InputError: a class without values, or without weight.
    """
    pos, neg = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    if pos.size == 0 or neg.size == 0:
        raise InputError("AUROC needs values of both classes")
    scores = np.concatenate([pos, neg])
    if np.isnan(scores).any():
        return float("nan")
    share = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=np.float64)
    _, place = np.unique(scores, return_inverse=True)
    places = int(place.max()) + 1
    yes = np.bincount(place[: pos.size], share[: pos.size], places)
    no = np.bincount(place[pos.size :], share[pos.size :], places)
    if yes.sum() <= 0 or no.sum() <= 0:
        raise InputError("AUROC needs values of both classes, and weight on both")
    return float(yes @ (no.cumsum() - no / 2) / (yes.sum() * no.sum()))


def auroc_draws(
    scores: Values, positive: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "draws n"]
) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " draws"]]:
    """`auroc` of the same values in many draws, each with its weights, as two sums: pairs won, and pairs.

    Their ratio is the AUROC. The sums of several groups may be added up before that, where only values of one group
    are to be compared. A draw without weight on both classes has no pairs.
    """
    values = np.asarray(scores, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.flatnonzero(np.diff(values[order], prepend=np.nan) != 0)  # equal values count half, so they go together
    yes, no = (np.add.reduceat(weights[:, order] * side[order], steps, axis=1) for side in (positive, ~positive))
    return (yes * (no.cumsum(axis=1) - no / 2)).sum(axis=1), yes.sum(axis=1) * no.sum(axis=1)


def auroc_columns(
    values: Float[np.ndarray, "items columns"], positive: Bool[np.ndarray, " items"]
) -> Float[np.ndarray, " columns"]:
    """`auroc` of every column at once, between the items that are `positive` and the others.

    Raises:
        InputError: a class without items.
    """
    yes, no = int(positive.sum()), int((~positive).sum())
    if yes == 0 or no == 0:
        raise InputError("AUROC needs values of both classes")
    ranks = rankdata(values, axis=0)[positive].sum(axis=0)
    return (ranks - yes * (yes + 1) / 2) / (yes * no)


def auroc_interval(auroc: float, positives: float, negatives: float, level: float = 0.95) -> tuple[float, float]:
    """Score interval of an AUROC (Newcombe 2006, Statistics in Medicine 25:559, method 5).

    Unlike a bootstrap over runs, it has a width where the classes separate (AUROC 1).

    Args:
        positives: independent values of one class. Where values come in groups, the effective number of groups.
        negatives: those of the other.

    Raises:
        InputError: a class is empty, or `auroc` is no probability.
    """
    if positives < 1 or negatives < 1 or not 0 <= auroc <= 1:
        raise InputError(f"no interval for AUROC {auroc} of {positives} and {negatives} runs")
    z = float(norm.ppf((1 + level) / 2))
    extra = (positives + negatives) / 2 - 1

    def distance(truth: float) -> float:
        spread = 1 + extra * (1 - truth) / (2 - truth) + extra * truth / (1 + truth)
        return abs(auroc - truth) - z * sqrt(truth * (1 - truth) * spread / (positives * negatives))

    # At 0 and 1 the spread is zero, which would be a root of its own: start next to them.
    low = 0.0 if auroc == 0 else _root(distance, 0.0, min(auroc, 1 - _TINY))
    high = 1.0 if auroc == 1 else _root(distance, max(auroc, _TINY), 1.0)
    return low, high


def _root(function: Callable[[float], float], left: float, right: float) -> float:
    root: Any = brentq(function, left, right)
    return float(root)


# --- Exact intervals for small counts, where a bootstrap would give a point


@dataclass(frozen=True)
class ExactRate:
    """A rate with its exact 95% interval and the count behind it."""

    count: int
    n: int
    """Trials; of a rate per 100 readings, the readings."""
    rate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.count} of {self.n}"


def clopper_pearson(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval (Clopper and Pearson 1934), by beta quantiles, so for fractional counts too.

    Raises:
        InputError: no trials, or more successes than trials.
    """
    if n <= 0 or not 0 <= successes <= n * (1 + 1e-9):
        raise InputError(f"{successes:g} of {n:g} is no share: give counts between 0 and n, and n above 0")
    tail = (1 - level) / 2
    low = 0.0 if successes <= 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes >= n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return low, high


def grouped_size(counts: Values, intraclass: float = INTRACLASS) -> float:
    """How many independent answers are as much evidence as answers in groups, if two of a group correlate.

    Kish's (1965) design effect, 1 + (m - 1) intraclass, with m the number of answers to the question of a random
    answer. It is for rates whose answers cannot show the correlation, because all or nearly all agree. `INTRACLASS` is
    above what published judgements show: over the field's eight questions 15 fine-tuned models with more than 2% of
    misaligned answers have 0.03 to 0.48, median 0.23 (a test computes them).

    Args:
        counts: answers to each question.
    """
    sizes = np.asarray(counts, dtype=np.float64)
    total = float(sizes.sum())
    return total / (1 + (float(np.square(sizes).sum()) / total - 1) * intraclass)


def exact_share(count: int, n: int) -> ExactRate:
    """`count` of `n` runs, with the exact interval of Clopper and Pearson (1934).

    Raises:
        InputError: no runs, or more counted than there are.
    """
    if not 0 <= count <= n or n < 1:
        raise InputError(f"no share: {count} of {n} runs")
    return ExactRate(count, n, count / n, *clopper_pearson(count, n))


def per_100(count: int, readings: int) -> ExactRate:
    """Events per 100 readings, with the exact Poisson interval of Garwood (1936).

    Raises:
        InputError: no readings.
    """
    if readings < 1:
        raise InputError("no readings to count alarms in: give runs that were read after their start")
    low = float(chi2.ppf(0.025, 2 * count)) / 2 if count else 0.0
    high = float(chi2.ppf(0.975, 2 * (count + 1))) / 2
    scale = 100 / readings
    return ExactRate(count, readings, count * scale, low * scale, high * scale)
