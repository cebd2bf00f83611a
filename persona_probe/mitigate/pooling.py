"""Paired means and ratios of item values over questions and seeds, with intervals that resample both."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from persona_probe.evaluate.cells import Cells, resampled
from persona_probe.stats import Estimate

MISSING = Estimate(float("nan"), float("nan"), float("nan"), 0)


@dataclass(frozen=True)
class Values:
    """One measure of one model, or of one mitigation's models: items by seeds."""

    frame: pd.DataFrame
    """Index: item; a column for each seed."""

    @classmethod
    def of(cls, items: pd.DataFrame) -> "Values":
        """From rows with item, seed and value; several values of an item and seed are averaged."""
        seeds = items["seed"].fillna(-1).astype(int)
        return cls(items.assign(seed=seeds).pivot_table(index="item", columns="seed", values="value", sort=False))

    @property
    def empty(self) -> bool:
        """Whether nothing was measured."""
        return self.frame.empty

    def minus(self, other: "Values") -> "Values":
        """Item by item and seed by seed; a side of one model that has no seed (the base) is taken at every seed."""
        if self.empty or other.empty:
            return Values(pd.DataFrame())
        right = other.frame
        if list(right.columns) == [-1]:
            return Values(self.frame.sub(right[-1], axis=0).dropna())
        seeds = [seed for seed in self.frame.columns if seed in right.columns]
        return Values((self.frame[seeds] - right[seeds]).dropna())

    @property
    def cells(self) -> Cells:
        """As `evaluate.cells` resamples them."""
        values = self.frame.to_numpy(float)
        return Cells(tuple(self.frame.index), tuple(self.frame.columns), values, np.ones_like(values))


def mean(values: Values) -> Estimate:
    """Mean over items and seeds; `MISSING` where there are none.

    Questions and seeds are resampled together (Owen 2007, see `evaluate.cells.resampled`).
    """
    if values.empty or values.frame.shape[1] == 0:
        return MISSING
    cells = values.cells
    return _estimate(cells.total / cells.count, resampled([cells])[0], cells.count)


def ratio(above: Values, below: Values) -> Estimate:
    """Mean of `above` over mean of `below`, on the items and seeds that both have, paired in every draw.

    `MISSING` where there are none, or where the mean below is not positive: there is nothing to be a share of.
    """
    if above.empty or below.empty:
        return MISSING
    seeds = [seed for seed in above.frame.columns if seed in below.frame.columns]
    items = [item for item in above.frame.index if item in below.frame.index]
    if not seeds or not items:
        return MISSING
    top, bottom = (Values(side.frame.loc[items, seeds]).cells for side in (above, below))
    if bottom.total <= 0:
        return MISSING
    draws = resampled([top, bottom])
    return _estimate(top.total / bottom.total, np.divide(*draws), top.count)


def exponential(found: Estimate) -> Estimate:
    """The same, of the exponential: log ratios become ratios."""
    middle, low, high = (float(np.exp(value)) for value in (found.estimate, found.ci_low, found.ci_high))
    return Estimate(middle, low, high, found.n)


def _estimate(value: float, draws: np.ndarray, n: int) -> Estimate:
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), n)
