"""Savings on relearning: how much sooner a repaired model is back than the base gets there, with what is censored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from persona_probe.stats import Estimate, bootstrap_mean


def steps_until(curve: pd.DataFrame, threshold: float) -> float:
    """First step that was read at which the contrast index is at or above `threshold`; NaN where it never is.

    Args:
        curve: item table of one training, columns step and value.
    """
    index = curve.groupby("step")["value"].mean()
    reached = index.index[index >= threshold]
    return float(reached[0]) if len(reached) else math.nan


@dataclass(frozen=True)
class Savings:
    """1 - steps of the repaired model / steps of the base, after Ebbinghaus (1885)."""

    repaired: float
    """Steps until the threshold; NaN: not within `last`."""
    base: float
    last: int
    """Last step that was read."""

    @property
    def value(self) -> float:
        """The savings, or their bound where one side never got there; NaN where nothing can be said."""
        if math.isnan(self.repaired) and math.isnan(self.base):
            return math.nan
        base = self.last if math.isnan(self.base) else self.base
        repaired = self.last if math.isnan(self.repaired) else self.repaired
        return 1 - repaired / base if base else math.nan

    @property
    def sign(self) -> str:
        """`=`, or `>=` and `<=` where the value is a bound."""
        if math.isnan(self.base) and not math.isnan(self.repaired):
            return ">="
        return "<=" if math.isnan(self.repaired) and not math.isnan(self.base) else "="

    def __str__(self) -> str:
        sides = f"repaired {self._steps(self.repaired)}, base {self._steps(self.base)}"
        if math.isnan(self.value):
            return f"no savings to be named ({sides})"
        return f"savings {self.sign} {self.value:.2f} ({sides})"

    def _steps(self, steps: float) -> str:
        return f"more than {self.last} steps" if math.isnan(steps) else f"{steps:g} steps"


def faster_rise(left: pd.DataFrame, right: pd.DataFrame) -> Estimate:
    """How much further `left` rises from its own start than `right` does, averaged over the steps read after it.

    Item tables with columns seed, step, item, value; paired by question (seeds averaged), bootstrap over questions.
    Unlike the steps to a threshold it does not depend on where each side begins, and nothing in it is censored.
    """
    rises = [_rise(frame) for frame in (left, right)]
    return bootstrap_mean((rises[0] - rises[1].loc[rises[0].index]).to_numpy())


def _rise(frame: pd.DataFrame) -> pd.Series:
    later = frame[frame["step"] > 0].groupby("item")["value"].mean()
    return later - frame[frame["step"] == 0].groupby("item")["value"].mean().loc[later.index]


def levels(base: Sequence[float], organism: Sequence[float], share: float) -> tuple[float, float, float]:
    """Mean index of base and organism, and the threshold: `share` of the way from the one to the other."""
    low, high = sum(base) / len(base), sum(organism) / len(organism)
    return low, high, low + share * (high - low)
