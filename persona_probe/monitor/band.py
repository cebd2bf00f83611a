"""The base band: the interval that a feature's reading keeps on the base model."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, isnan, nan
from typing import Self

import numpy as np
from jaxtyping import Float

from persona_probe.monitor.events import FeatureValue


@dataclass(frozen=True)
class Band:
    """A closed interval of readings."""

    low: float
    high: float

    @classmethod
    def of(cls, mean: float, sd: float, width: float) -> Self:
        """`mean` +- `width` standard deviations; NaN ends where the deviation is not known."""
        return cls(mean - width * sd, mean + width * sd)

    def holds(self, reading: float) -> bool:
        """Whether the reading lies inside."""
        return self.low <= reading <= self.high


CHANCE = 4.0
"""A direction is outside a default band only where it moved more than this many times what random directions do. For
directions drawn at random that happens once in some 16,000."""


def beyond_chance(low: float, high: float, feature: FeatureValue) -> tuple[float, float]:
    """A default band, at least as wide as what random directions move: training moves all of them."""
    if isnan(feature.chance):
        return low, high
    reach = CHANCE * feature.chance
    return min(low, feature.base_mean - reach), max(high, feature.base_mean + reach)


def base_band(values: Float[np.ndarray, " probes"], width_sd: float) -> Band:
    """The band of one feature around its mean on the base model.

    Args:
        values: the feature on each probe, on the base model.
        width_sd: half-width in standard deviations between probes (an effect size: Cohen's d of a model from the base).
    """
    return Band.of(float(np.mean(values)), float(np.std(values, ddof=1)), width_sd)


# --- Bands by feature, as a `Start` event holds them

Bands = Mapping[str, tuple[float, float]]


def band_state(feature: FeatureValue, bands: Bands) -> str:
    """Where a feature's mean lies: `inside`, `above` or `below` its base band, `no band`, or `not finite`."""
    if not isfinite(feature.mean):
        return "not finite"
    low, high = bands.get(feature.name, (nan, nan))
    if isnan(low) or isnan(high):
        return "no band"
    low, high = beyond_chance(low, high, feature)
    return "below" if feature.mean < low else "above" if feature.mean > high else "inside"
