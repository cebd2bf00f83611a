"""What training on data with a given score does: a line through our studies' data sets, with a prediction interval."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.stats import t

from persona_probe.errors import InputError

LEAST = 5
"""Fewer data sets give no line."""


@dataclass(frozen=True)
class ScoredRun:
    """One training run."""

    data: str
    """The data set that it was trained on: runs of one set are no separate evidence about other sets."""
    seed: int
    score: float
    """Mean score of the training rows."""
    shift: float
    """Contrast index at the end minus the base's, nats per token."""


@dataclass(frozen=True)
class ShiftLine:
    """A least-squares line through data sets, each the mean of its runs."""

    pairs: tuple[ScoredRun, ...]
    slope: float
    intercept: float
    error: float
    """Residual standard deviation, nats per token."""
    left_out: float
    """Root mean square error of each data set predicted from the others."""
    baseline: float
    """The same error of predicting the others' mean: what knowing the score must beat."""
    source: str = "given pairs"

    @property
    def sets(self) -> dict[str, tuple[float, float]]:
        """Each data set's mean score and mean shift."""
        return _means(self.pairs)

    @property
    def scores(self) -> Float[np.ndarray, " sets"]:
        """The data sets' scores."""
        return np.array([x for x, _ in self.sets.values()])

    @property
    def shifts_from_others(self) -> Float[np.ndarray, " sets"]:
        """Each data set's shift as the line through the other sets has it."""
        return _from_others(*_columns(self.sets))

    @property
    def statement(self) -> str:
        """The evidence behind a prediction, in a sentence."""
        return (
            f"{len(self.sets)} data sets ({len(self.pairs)} runs, {self.source}); leaving one data set out, the error "
            f"is {self.left_out:.2f} nats per token (predicting the mean: {self.baseline:.2f})"
        )

    def interval(self, score: float) -> tuple[float, float, float]:
        """Estimate and ends of the 95% prediction interval for one more data set (Student t, n - 2)."""
        x = self.scores
        spread = 1 + 1 / len(x) + (score - x.mean()) ** 2 / np.square(x - x.mean()).sum()
        half = float(t.ppf(0.975, len(x) - 2) * self.error * np.sqrt(spread))
        estimate = self.intercept + self.slope * score
        return estimate, estimate - half, estimate + half


def calibrate(pairs: Iterable[ScoredRun], source: str = "given pairs") -> ShiftLine:
    """Fit the line; runs on the same data are averaged first, so that seeds do not count as data sets.

    Raises:
        InputError: fewer than five data sets, equal scores, or a number that is not finite.
    """
    runs = tuple(pairs)
    x, y = _columns(_means(runs))
    if len(x) < LEAST:
        raise InputError(f"{len(x)} data sets: a calibration needs at least {LEAST}; add runs on other data")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("a pair's score or shift is not finite: leave it out")
    if np.ptp(x) == 0:
        raise InputError("all data sets have the same score: a line needs sets that differ")
    slope, intercept = _line(x, y)
    error = float(np.sqrt(np.square(y - intercept - slope * x).sum() / (len(x) - 2)))
    left_out, baseline = _left_out(x, y)
    return ShiftLine(runs, slope, intercept, error, left_out, baseline, source)


def _means(pairs: Sequence[ScoredRun]) -> dict[str, tuple[float, float]]:
    names = dict.fromkeys(pair.data for pair in pairs)
    by_set = {name: [pair for pair in pairs if pair.data == name] for name in names}
    return {
        name: (float(np.mean([p.score for p in of])), float(np.mean([p.shift for p in of])))
        for name, of in by_set.items()
    }


def _columns(sets: Mapping[str, tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([x for x, _ in sets.values()]), np.array([y for _, y in sets.values()])


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / np.square(x - x.mean()).sum())
    return slope, float(y.mean() - slope * x.mean())


def _left_out(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Root mean square error on left-out sets: of the line, and of the others' mean."""
    others = (y.sum() - y) / (len(y) - 1)
    line, mean = (float(np.sqrt(np.mean(np.square(y - predicted)))) for predicted in (_from_others(x, y), others))
    return line, mean


def _from_others(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Each set's shift by the line through the other sets."""
    predicted = []
    for i in range(len(x)):
        rest = np.arange(len(x)) != i
        if np.ptp(x[rest]) == 0:
            raise InputError("all data sets but one have the same score: a line needs sets that differ")
        slope, intercept = _line(x[rest], y[rest])
        predicted.append(intercept + slope * x[i])
    return np.array(predicted)
