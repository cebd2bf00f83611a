"""Intervals: paired and clustered bootstrap, AUROC. Everything takes a seed and returns an `Estimate`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from persona_probe.errors import InputError

Values = Sequence[float] | Float[np.ndarray, " n"]


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
        return f"{self.estimate:+.3f} [{self.ci_low:+.3f}, {self.ci_high:+.3f}]"


def bootstrap_mean(
    values: Values,
    clusters: Sequence[object] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Mean with a percentile bootstrap interval (Efron 1979), resampling whole clusters.

    Args:
        values: one number an item; for a paired effect pass the items' differences.
        clusters: what the items are nested in (question, say); None means that each item is its own cluster.
        level: coverage of the interval.

    Raises:
        InputError: no values, a value that is not finite, or `clusters` of another length.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise InputError("no values to average: the selection is empty")
    if not np.isfinite(array).all():
        raise InputError(f"{(~np.isfinite(array)).sum()} of {array.size} values are not finite")
    sums, counts = _cluster_totals(array, clusters)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(sums), size=(n_boot, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(array.mean()), float(low), float(high), int(array.size))


def paired_difference(
    left: Values, right: Values, clusters: Sequence[object] | None = None, n_boot: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of `left - right` over the same items, with its clustered bootstrap interval.

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


def auroc(positive: Values, negative: Values) -> float:
    """Probability that a positive value exceeds a negative one, ties counted half (Mann-Whitney U / n1 n2)."""
    pos, neg = np.asarray(positive, dtype=np.float64), np.asarray(negative, dtype=np.float64)
    if pos.size == 0 or neg.size == 0:
        raise InputError("AUROC needs values of both classes")
    ranks = rankdata(np.concatenate([pos, neg]))
    return float((ranks[: pos.size].sum() - pos.size * (pos.size + 1) / 2) / (pos.size * neg.size))


def _cluster_totals(array: np.ndarray, clusters: Sequence[object] | None) -> tuple[np.ndarray, np.ndarray]:
    if clusters is None:
        return array, np.ones_like(array)
    if len(clusters) != array.size:
        raise InputError(f"{array.size} values but {len(clusters)} cluster names")
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    codes = np.array([names[c] for c in clusters])
    return np.bincount(codes, weights=array), np.bincount(codes).astype(np.float64)
