"""The base band: the interval that a feature's reading keeps on the base model."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Band:
    """A closed interval of readings."""

    low: float
    high: float

    def holds(self, reading: float) -> bool:
        """Whether the reading lies inside."""
        return self.low <= reading <= self.high


def base_band(values: Float[np.ndarray, " probes"], width_sd: float) -> Band:
    """Base reading +- `width_sd` standard deviations between probes.

    Args:
        values: the feature on each probe, on the base model.
        width_sd: half-width in base standard deviations (an effect size: Cohen's d between model and base).
    """
    centre, half = float(np.mean(values)), width_sd * float(np.std(values, ddof=1))
    return Band(centre - half, centre + half)
