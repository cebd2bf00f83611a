"""What a correction came to, as numbers: behaviour against the base, the feature against its band, and when."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.evaluate.effects import arm_effect
from persona_probe.monitor.band import Band
from persona_probe.stats import Estimate

FEATURE = "persona"


def outcome(
    readings: pd.DataFrame, evals: pd.DataFrame, base_evals: pd.DataFrame, band: Band, feature: str = FEATURE
) -> dict[str, Any]:
    """The numbers of one correction (one arm and seed), as plain JSON values.

    Returns:
        steps taken; `index_minus_base` and `start_minus_base` (contrast index, nats per token, paired by item, with
        interval); `behaviour_back` (the interval reaches the base); the feature's last reading, its band and
        `in_band`; `steps_to_band` and `steps_to_behaviour`, the first step from which each stays so until the end
        (None: not by the end); explained variance at the end. Without evals all of behaviour is None.
    """
    curve = readings[readings["feature"] == feature].sort_values("step")
    last, gaps = curve.iloc[-1], index_gaps(evals, base_evals)
    mean, ends = float(last["mean"]), (gaps[min(gaps)], gaps[max(gaps)]) if gaps else (None, None)
    return {
        "steps": int(last["step"]),
        "index_minus_base": ends[1].to_dict() if ends[1] else None,
        "start_minus_base": ends[0].to_dict() if ends[0] else None,
        "behaviour_back": ends[1].ci_low <= 0 if ends[1] else None,
        "feature": {"estimate": mean, "ci_low": float(last["ci_low"]), "ci_high": float(last["ci_high"])},
        "band": {"low": band.low, "high": band.high},
        "in_band": band.holds(mean),
        "steps_to_band": _or_none(steps_to_band(curve.assign(feature=FEATURE), band)),
        "steps_to_behaviour": _or_none(first_lasting(list(gaps), [gap.ci_low <= 0 for gap in gaps.values()])),
        "explained_variance": float(last["explained_variance"]),
    }


def index_gaps(evals: pd.DataFrame, base_evals: pd.DataFrame) -> dict[int, Estimate]:
    """Contrast index minus the base's, paired by item, by step ascending."""
    if evals.empty:
        return {}
    base = base_evals[["item", "value"]].assign(arm="base", seed=0, step=0)
    gaps: dict[int, Estimate] = {}
    for step in sorted(evals["step"].unique().tolist()):
        rows = evals[evals["step"] == step].assign(arm="corrected", seed=0, step=0)
        gaps[int(step)] = arm_effect(pd.concat([rows, base]), "corrected", "base")
    return gaps


def _or_none(step: float) -> float | None:
    return None if step != step else step


def steps_to_band(readings: pd.DataFrame, band: Band) -> float:
    """First step from which the persona feature stays in the band (until the end of the run); NaN if it never does."""
    curve = readings.query("feature == 'persona'").sort_values("step")
    return first_lasting(curve["step"].tolist(), [band.holds(value) for value in curve["mean"]])


def first_lasting(steps: Sequence[float], inside: Sequence[bool]) -> float:
    """The first step from which all are inside until the end; NaN if the last is not."""
    if not inside or not inside[-1]:
        return float("nan")
    outside = np.flatnonzero(~np.array(inside))
    return float(steps[0 if outside.size == 0 else int(outside[-1]) + 1])
