"""Records of a labelled study: many runs with shares of bad data, as `persona-probe monitor study` leaves them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from persona_probe.monitor_study.evaluation import behaviour_rises

RUN_COLUMNS = (
    *("run", "arm", "data", "bad_share", "seed", "use", "steps", "long", "label"),
    *("rise", "ci_low", "ci_high", "behaviour_step"),
)
PERSONA = "persona"


@dataclass(frozen=True)
class LabelledRuns:
    """Tables of a labelled study; empty where there is none."""

    readings: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["run", "feature", "step"]))
    """One row per run, step and feature."""
    evals: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["run", "item", "step", "value"]))
    """One row per run, step and contrast item (nats per token)."""
    results: Mapping[str, Any] = field(default_factory=dict)
    """`results.json`: labels, thresholds, alarms."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The study's config."""

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run: its data, `bad_share` (0 to 1; NaN for another data set), label, and rise at the end."""
        rows = [{**run, "bad_share": self._share(run)} for run in self.results.get("runs", [])]
        return pd.DataFrame(rows, columns=list(RUN_COLUMNS))

    @cached_property
    def rises(self) -> pd.DataFrame:
        """Columns run, step, rise, ci_low, ci_high: contrast index minus the base's (nats per token)."""
        return behaviour_rises(self.evals)

    @cached_property
    def shifts(self) -> pd.DataFrame:
        """The persona feature minus the base's, in base standard deviations: run, step, shift, ci_low, ci_high, n."""
        rows = self.readings.loc[self.readings["feature"] == PERSONA]
        spread = rows["base_sd"]
        ends = {c: (rows[c] - rows["base_mean"]) / spread for c in ("ci_low", "ci_high")}
        table = rows.assign(shift=(rows["mean"] - rows["base_mean"]) / spread, **ends, n=rows["n_probes"])
        return table[["run", "step", "shift", "ci_low", "ci_high", "n", "explained_variance"]].reset_index(drop=True)

    @property
    def mixture(self) -> tuple[str, str] | None:
        """The bad data and the good data that the study's mixtures are made of; None where it has no mixture."""
        arms = self.config.get("arms", {}).values()
        return next(((str(a["data"]), str(a["mix_with"])) for a in arms if a.get("mix_with")), None)

    def _share(self, run: Mapping[str, Any]) -> float:
        """Share of bad rows of a run on the mixtures' data; NaN for a run on other data."""
        if self.mixture is None or run["data"] not in self.mixture:
            return float("nan")
        arm = self.config["arms"][run["arm"]]
        return float(arm["bad_fraction"]) if run["data"] == self.mixture[0] else 0.0
