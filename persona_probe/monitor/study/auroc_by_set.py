"""AUROC over runs with the data set as the unit: runs of one data set share rows, so they are not independent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from persona_probe.errors import InputError
from persona_probe.stats import Values, auroc, auroc_interval

FEWEST_SETS = 3
"""Data sets that each side needs for an interval. With two, runs that all separate could not exclude 0.5."""


@dataclass(frozen=True)
class SetAuroc:
    """An AUROC over runs, and what the data sets say about it."""

    auroc: float
    """Chance that a run of the first kind has the higher value, over pairs of runs; NaN: one kind has no run."""
    low: float
    """95% interval for one more run of each kind, on new data sets; NaN: fewer than `FEWEST_SETS`."""
    high: float
    positives: int
    """Runs."""
    negatives: int
    positive_sets: int
    """Data sets of those runs."""
    negative_sets: int
    left_out: dict[str, float]
    """Data set to the AUROC without its runs; NaN where one kind then has no run."""

    @property
    def left_out_range(self) -> tuple[float, float]:
        """Lowest and highest AUROC with one data set left out; NaN where no data set can be left out."""
        values = [value for value in self.left_out.values() if value == value]
        return (min(values), max(values)) if values else (np.nan, np.nan)


def effective_sets(sets: Sequence[str]) -> float:
    """Data sets that count: (runs)^2 over the sum of squared runs of each (Kish 1965).

    This is the number of data sets where all have as many runs, and less where one has most of them.
    """
    counts = np.unique(np.asarray(sets, dtype=str), return_counts=True)[1]
    return float(counts.sum() ** 2 / np.square(counts).sum())


def auroc_by_set(
    positive: Values, negative: Values, positive_sets: Sequence[str], negative_sets: Sequence[str]
) -> SetAuroc:
    """AUROC of runs, with the interval that the number of their data sets supports.

    The interval is Newcombe's score interval (`stats.auroc_interval`), with the effective number of data sets in the
    place of runs. It is right where the runs of one data set all go together, and too wide where they do not: a few
    data sets cannot show which of the two holds. With one run a data set it is Newcombe's own.

    Args:
        positive: one value a run; the higher, the more it looks like one of these.
        negative: one value a run of the other kind.
        positive_sets: the data set of each positive run.
        negative_sets: the data set of each negative run. One that is on both sides is left out on both together.

    Raises:
        InputError: values and data sets that differ in number.
    """
    if len(positive) != len(positive_sets) or len(negative) != len(negative_sets):
        raise InputError(
            f"{len(positive)} and {len(negative)} runs, but {len(positive_sets)} and {len(negative_sets)} data sets: "
            "name the data set of every run"
        )
    kinds, counts = (len(set(positive_sets)), len(set(negative_sets))), (len(positive), len(negative))
    area = _auroc(np.asarray(positive), np.asarray(negative))
    low, high = np.nan, np.nan
    if min(kinds) >= FEWEST_SETS and area == area:
        low, high = auroc_interval(area, effective_sets(positive_sets), effective_sets(negative_sets))
    left_out = {}
    for name in dict.fromkeys([*positive_sets, *negative_sets]):
        kept = [
            np.array([value for value, own in zip(values, sets, strict=True) if own != name])
            for values, sets in ((positive, positive_sets), (negative, negative_sets))
        ]
        left_out[name] = _auroc(*kept)
    return SetAuroc(area, low, high, *counts, *kinds, left_out)


def _auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    return auroc(positive, negative) if len(positive) and len(negative) else np.nan


# --- Labelled runs: how well a signal tells them apart

MISALIGNED, QUIET, BENIGN = "misaligned", "quiet", "benign"


@dataclass(frozen=True)
class Separation(SetAuroc):
    """AUROC of one signal at one step, of misaligned against benign runs; the direction was fixed beforehand."""

    signal: str
    step: int
    """-1: each run's own last reading."""
    against_quiet: float
    """The AUROC with quiet runs counted among the negatives."""


def separation(signals: pd.DataFrame, labels: pd.DataFrame, signal: str, step: int) -> Separation:
    """How well a signal's value at a step tells misaligned from benign runs; runs without that step are left out.

    Args:
        signals: columns run, step, signal, value.
        labels: columns run, label and data_set; without the last, each run is a data set of its own.
    """
    at = signals[(signals["signal"] == signal) & (signals["step"] == step)].dropna(subset=["value"])
    return _separation(at.set_index("run")["value"], labels, signal, step)


def separation_at_end(signals: pd.DataFrame, labels: pd.DataFrame, signal: str) -> Separation:
    """The same with every run's own last value, so that a long benign run counts with all its drift; step is -1."""
    values = signals[signals["signal"] == signal].dropna(subset=["value"]).sort_values("step")
    return _separation(values.groupby("run")["value"].last(), labels, signal, -1)


def _separation(values: pd.Series, labels: pd.DataFrame, signal: str, step: int) -> Separation:
    set_of = (
        labels.set_index("run")["data_set"] if "data_set" in labels else pd.Series(labels["run"].array, labels["run"])
    )
    bad, good, quiet = (
        values[values.index.isin(labels.loc[labels["label"] == label, "run"])] for label in (MISALIGNED, BENIGN, QUIET)
    )
    found = auroc_by_set(bad.tolist(), good.tolist(), set_of[bad.index].tolist(), set_of[good.index].tolist())
    against_quiet = _auroc(bad.to_numpy(), np.concatenate([good, quiet])) if len(good) else np.nan
    return Separation(**vars(found), signal=signal, step=step, against_quiet=against_quiet)
