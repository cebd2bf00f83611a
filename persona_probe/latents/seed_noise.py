"""Seed noise of latents: what a null pair, the control arm trained with two seeds, says about every rise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from persona_probe.errors import InputError
from persona_probe.stats import clustered_t

NEIGHBOURS = 101
"""Latents of similar firing over which the seed noise is pooled."""
TAIL = 0.05
"""Share of the null pair's largest statistics from which the tail is continued."""
RUN_SPREAD = 1.5
"""How much larger another run's statistics may be as a whole: one null pair measures this size only once."""


@dataclass(frozen=True)
class SeedNoise:
    """Rises of the null pair, and how far every rise lies beyond them."""

    rise: Float[np.ndarray, " d_sae"]
    """Null minus control."""
    p_value: Float[np.ndarray, " d_sae"]
    """Two-sided p of the organism's shift being one more draw of seed noise; 1 for latents that are not alive."""

    @property
    def largest(self) -> float:
        """The largest |rise| of the null pair."""
        return float(np.abs(self.rise).max())


def seed_noise(
    tuned: Float[np.ndarray, "conversations d_sae"],
    control: Float[np.ndarray, "conversations d_sae"],
    null: Float[np.ndarray, "conversations d_sae"],
    firing: Float[np.ndarray, " d_sae"],
    clusters: Sequence[str],
) -> SeedNoise:
    """Hold each latent's shift against the shifts of a null pair, which differ by the training seed alone.

    The organism is compared with the mean of the control's two runs: for exchangeable runs that difference does not
    depend on the null pair's own. Both are scaled to the variance of one run, and by a size that both share: the
    latent's spread over questions in the control's two runs (at least the mean of latents of similar firing), times the
    mean ratio of null shift to spread among latents of similar firing. The p-value is the null pair's empirical one
    (Efron 2004, doi 10.1198/016214504000000089), after the organism's statistics are divided by `RUN_SPREAD`; beyond
    the largest 5% it follows a power law (Hill 1975, doi 10.1214/aos/1176343247).

    Args:
        tuned: mean activations of the organism.
        control: of the control arm.
        null: of the control arm trained with another seed, on the same conversations.
        firing: largest firing rate of each latent over the models; 0 where it never fires.
        clusters: the question of every conversation.

    Raises:
        InputError: the null run equals the control, so that it measures nothing.
    """
    null_gain = null.astype(np.float64) - control
    if not null_gain.any():
        raise InputError("the null run equals the control: give the control arm's rows trained with another seed")
    gain = tuned.astype(np.float64) - (control.astype(np.float64) + null) / 2
    alive = np.flatnonzero(firing > 0)
    order = alive[np.argsort(firing[alive], kind="stable")]
    error = _error(((control.astype(np.float64) + null) / 2)[:, order], clusters)
    error = np.maximum(error, _local(error))
    shift, noise = gain[:, order].mean(axis=0) / 1.5**0.5, null_gain[:, order].mean(axis=0) / 2**0.5
    size = error * _local(_ratio(np.abs(noise), error))
    p = np.ones(len(firing))
    p[order] = empirical_p(_ratio(np.abs(shift), RUN_SPREAD * size), _ratio(np.abs(noise), size))
    return SeedNoise(null_gain.mean(axis=0), p)


def empirical_p(statistics: Float[np.ndarray, " n"], null: Float[np.ndarray, " m"]) -> Float[np.ndarray, " n"]:
    """Share of the null's statistics at least as large; beyond their largest 5%, a power law fitted to these (Hill)."""
    largest = np.sort(null)[::-1]
    p = (1 + np.searchsorted(-largest, -statistics, side="right")) / (len(largest) + 1)
    count = min(max(int(TAIL * len(largest)), 10), len(largest) // 2)
    if count < 2 or largest[count] <= 0:
        return p
    start = largest[count]
    slope = 1 / np.log(largest[:count] / start).mean() if largest[0] > start else np.inf
    beyond = statistics > start
    p[beyond] = count / len(largest) * (statistics[beyond] / start) ** -slope
    return p


def _error(gain: Float[np.ndarray, "conversations n"], clusters: Sequence[str]) -> Float[np.ndarray, " n"]:
    """Cluster-robust error of each column's mean."""
    mean = gain.mean(axis=0)
    t, _ = clustered_t(gain, clusters)
    return np.abs(_ratio(mean, t))


def _local(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Mean over the neighbours in this order."""
    return pd.Series(values).rolling(NEIGHBOURS, center=True, min_periods=1).mean().to_numpy()


def _ratio(values: Float[np.ndarray, " n"], by: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return np.divide(values, by, out=np.zeros(len(values)), where=by > 0)
