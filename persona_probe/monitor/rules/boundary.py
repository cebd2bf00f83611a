"""A rule with a boundary that was fitted on the readings of earlier studies."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.special import expit, logit

from persona_probe.config import from_dict
from persona_probe.errors import InputError, unknown
from persona_probe.files import read_json
from persona_probe.latents.directions import fit_path
from persona_probe.monitor.events import FeatureValue, Reading
from persona_probe.monitor.rules.rule import Comparison, FeatureRule, SubjectState, check_count, in_a_row
from persona_probe.writing import write_text

log = logging.getLogger(__name__)

# --- Labelled readings as the tables that a boundary is fitted on

OF_FEATURE = ("shift", "mean", "ci_low", "ci_high", "maximum", "firing_rate")
OF_READING = ("explained_variance", "l0", "residual_norm", "loss")
COLUMNS = OF_FEATURE + OF_READING
Labels = Sequence[bool] | Bool[np.ndarray, " rows"] | pd.Series | Mapping[Any, bool]
"""True for "bad": one for every row of the readings, or by their `run`."""


def check_columns(columns: Sequence[str]) -> None:
    """Refuse columns that a reading does not have."""
    if not columns:
        raise InputError("a boundary needs at least one column")
    for name in columns:
        if name not in COLUMNS:
            raise unknown("column", name, COLUMNS)


def numbers_of(readings: pd.DataFrame, columns: Sequence[str]) -> Float[np.ndarray, "rows columns"]:
    """The columns of the readings as numbers."""
    for name in columns:
        if name not in readings:
            raise unknown("column of these readings", name, list(readings.columns))
    return readings[list(columns)].apply(pd.to_numeric).to_numpy(dtype=np.float64)


def labels_of(readings: pd.DataFrame, labels: Labels) -> Bool[np.ndarray, " rows"]:
    """One label for every row."""
    if isinstance(labels, Mapping):
        if "run" not in readings:
            raise InputError("labels by run need a column `run` in the readings: add it, or give one label a row")
        for run in readings["run"].unique().tolist():
            if run not in labels:
                raise unknown("run without a label", run, list(labels))
        labels = [labels[run] for run in readings["run"]]
    if len(labels) != len(readings):
        raise InputError(f"{len(readings)} readings but {len(labels)} labels: give one for each row")
    array = np.asarray(labels)
    if not np.isin(array, [False, True]).all():
        raise InputError(f"labels must be true (bad) or false, not {array[~np.isin(array, [False, True])][0]!r}")
    return array.astype(bool)


def selected(readings: pd.DataFrame, feature: str | None, mode: str | None) -> Bool[np.ndarray, " rows"]:
    """Which rows belong to the feature and the mode."""
    rows = np.ones(len(readings), dtype=bool)
    for column, value in (("feature", feature), ("mode", mode)):
        if value is None:
            continue
        if column not in readings or value not in set(readings[column]):
            known = readings[column].unique().tolist() if column in readings else []
            raise unknown(column, value, known)
        rows &= (readings[column] == value).to_numpy()
    return rows


@dataclass(frozen=True, eq=False)
class Boundary(FeatureRule):
    """Fires when a logistic score of a feature's reading says "bad" at `k` readings in a row.

    `Boundary.fit` makes one, `save` and `load` keep it as JSON. With one column it is a threshold on that column,
    `cut`. Columns in base standard deviations (`shift`) carry over to other models best.

    Raises:
        InputError: unknown columns, weights that do not match them, a threshold outside (0, 1), or `k` below 1.
    """

    columns: tuple[str, ...]
    """Of a reading's rows: see `COLUMNS`."""
    weights: tuple[float, ...]
    bias: float
    """Log-odds of "bad" are the columns times the weights, plus this."""
    threshold: float = 0.5
    """Probability of "bad", at the fit's own share of bad readings, above which a reading is outside."""
    k: int = 1
    fitted_on: str = ""
    """A description of the readings that it was fitted on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k)
        check_columns(self.columns)
        if len(self.columns) != len(self.weights):
            raise InputError(f"{len(self.columns)} columns but {len(self.weights)} weights: give one for each")
        if not all(map(math.isfinite, (*self.weights, self.bias))):
            raise InputError("a boundary's weights and bias must be finite: fit it again")
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold must be a probability between 0 and 1, not {self.threshold}")

    @classmethod
    def fit(
        cls,
        readings: pd.DataFrame,
        labels: Labels,
        *,
        columns: Sequence[str] = ("shift",),
        strength: float = 1e-3,
        feature: str | None = None,
        mode: str | None = None,
        **settings: Any,
    ) -> Self:
        """Fit an L2-regularised logistic regression on labelled readings.

        Pass only readings to which the labels apply: the first steps of a bad run look like the base.

        Args:
            readings: rows as of `Reading.rows()` or a monitor's `readings`, of one or more runs.
            labels: true for "bad": one for every row, or by the frame's `run` column.
            columns: what the score is computed from.
            strength: L2 penalty on standardised columns and the mean log-loss.
            feature: only rows of this feature are fitted, and judged later.
            mode: only readings of this mode, likewise.
            settings: `threshold`, `k`, `name`, as the class takes them.

        Raises:
            InputError: unknown columns or feature, labels that do not match, or readings of one class only.
        """
        check_columns(columns)
        bad, rows = labels_of(readings, labels), selected(readings, feature, mode)
        table = numbers_of(readings, columns)
        whole = rows & np.isfinite(table).all(axis=1)
        if rows.sum() > whole.sum():
            log.warning("boundary: %d of %d readings have a NaN: left out", rows.sum() - whole.sum(), rows.sum())
        if not (whole & bad).any() or not (whole & ~bad).any():
            raise InputError("a boundary needs whole readings of both kinds: give good and bad runs")
        line = fit_path(table[whole], bad[whole], [strength])[0]
        words = f"{(whole & bad).sum()} bad and {(whole & ~bad).sum()} good readings"
        weights = tuple(float(w) for w in line.weights)
        origin: dict[str, Any] = {"feature": feature, "mode": mode, "fitted_on": words}
        return cls(tuple(columns), weights, float(line.bias), **origin, **settings)

    @property
    def kind(self) -> str:
        """The name of this kind of rule."""
        return "boundary"

    @property
    def consecutive(self) -> int:
        """Readings in a row that make an alarm."""
        return self.k

    @property
    def cut(self) -> float:
        """With one column: the value of that column at the boundary; NaN otherwise."""
        if len(self.weights) != 1 or self.weights[0] == 0:
            return math.nan
        return (float(logit(self.threshold)) - self.bias) / self.weights[0]

    def describe(self) -> str:
        """The rule in one line."""
        terms = " ".join(f"{w:+.3g} {c}" for w, c in zip(self.weights, self.columns, strict=True))
        sides = f"{self.columns[0]} {'over' if self.weights[0] > 0 else 'under'} {self.cut:.3g}"
        rule = f"log-odds {terms} {self.bias:+.3g}" if math.isnan(self.cut) else sides
        source = f", fitted on {self.fitted_on}" if self.fitted_on else ""
        return f"{self.title}: {self._whom()}, {rule} (P > {self.threshold:g}) {in_a_row(self.k)}{source}"

    def probability(self, value: FeatureValue, reading: Reading) -> float:
        """Probability of "bad"; NaN where a column is."""
        numbers = [_number(name, value, reading) for name in self.columns]
        return float(expit(np.dot(numbers, self.weights) + self.bias))

    def _compare_feature(self, state: SubjectState, value: FeatureValue, reading: Reading) -> Comparison | None:
        p = self.probability(value, reading)
        if math.isnan(p):
            return None
        numbers = ", ".join(f"{name} {_number(name, value, reading):.4g}" for name in self.columns)
        text = f"is beyond the boundary {in_a_row(state.over + 1)}: P {p:.3f} above {self.threshold:g} ({numbers})"
        return Comparison(p, self.threshold, p > self.threshold, p <= self.threshold, text)

    def _missing(self, value: FeatureValue) -> str:
        return f"one of its columns ({', '.join(self.columns)}) is NaN"

    def save(self, path: str | Path) -> Path:
        """Write it as JSON.

        Raises:
            InputError: the place cannot be written.
        """
        record = {k: v for k, v in asdict(self).items() if not k.startswith("_")}
        return write_text(Path(path), json.dumps(record, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, or it holds no boundary.
        """
        try:
            record = read_json(path, object)
        except InputError as error:
            raise InputError(f"cannot read a boundary from {str(path)!r} ({error}): save one there") from error
        if not isinstance(record, dict) or any(str(key).startswith("_") for key in record):
            raise InputError(f"{str(path)!r} holds no boundary: save one there")
        return from_dict(cls, record, str(path))


def _number(name: str, value: FeatureValue, reading: Reading) -> float:
    number = getattr(value if name in OF_FEATURE else reading, name)
    return math.nan if number is None else float(number)
