"""What a correction came to, as numbers: behaviour against the base, the feature against its band, and when."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from persona_probe.evaluate.effects import arm_effect, final_values
from persona_probe.monitor.band import Band
from persona_probe.stats import Estimate, bootstrap_statistic
from persona_probe.verdicts import MARGIN, NOT_RESTORED, RESTORED, SMALLEST_EFFECT, UNDECIDED, restored

FEATURE = "persona"

# --- What is left of the organism's rise after a correction


@dataclass(frozen=True)
class Left:
    """What a correction left of the organism's rise, all on the same questions (nats per token)."""

    word: str
    """The word of `verdicts.restored`; `undecided` too where the organism's own rise is not shown."""
    over_base: Estimate
    """Corrected minus base."""
    over_control: Estimate | None
    """Corrected minus control arm; None without one."""
    rise: Estimate | None
    """Organism minus control arm (minus base without one); None where the organism was not measured."""
    share: Estimate | None
    """Share of that rise that is left."""
    over_benign: Estimate | None
    """Corrected minus the organism after as many steps on rows that correct nothing."""
    bound: float
    """Nats per token below which the intervals' upper ends must lie: the margin times the rise."""

    @classmethod
    def of(
        cls,
        *,
        over_base: Estimate,
        over_control: Estimate | None,
        rise: Estimate | None,
        values: tuple[pd.Series, pd.Series, pd.Series] | None,
        over_benign: Estimate | None,
        margin: float,
    ) -> Self:
        """Judge differences that are there.

        Args:
            values: item by item the corrected model, the organism and the control arm (or base), for the share.
            margin: share of the rise that may be left; without a rise the smallest effect of interest bounds.
        """
        held = [over_base] if over_control is None else [over_control, over_base]
        bound = SMALLEST_EFFECT if rise is None else margin * max(rise.estimate, 0.0)
        word = restored(held, bound)
        shown = rise is None or rise.ci_low > 0
        if not shown and word != NOT_RESTORED:
            word = UNDECIDED
        share = _share(*values) if values is not None and rise is not None and shown else None
        return cls(word, over_base, over_control, rise, share, over_benign, bound)

    @property
    def text(self) -> str:
        """The numbers in words."""
        base = f"minus base {self.over_base}"
        first = base if self.over_control is None else f"minus control arm {self.over_control}, {base}"
        parts = [f"contrast index {first} nats/token, n = {self.over_base.n}"]
        if self.over_control is None:
            parts.append("no control arm to hold it against")
        if self.share is not None:
            over = "base" if self.over_control is None else "control arm"
            ends = f"{self.share.estimate:.0%} [{self.share.ci_low:.0%}, {self.share.ci_high:.0%}]"
            parts.append(f"{ends} of the organism's rise over the {over} is left")
        elif self.rise is not None:
            parts.append(f"the organism's own rise {self.rise} is not shown")
        if self.over_benign is not None:
            parts.append(f"minus as much training that corrects nothing {self.over_benign}")
        return "; ".join([*parts, f"restored below {self.bound:+.3f}"])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        names = ("over_base", "over_control", "rise", "share", "over_benign")
        numbers = {name: None if (e := getattr(self, name)) is None else e.to_dict() for name in names}
        return {**numbers, "bound": self.bound}


def what_is_left(
    base: pd.DataFrame,
    corrected: pd.DataFrame,
    organism: pd.DataFrame | None = None,
    control: pd.DataFrame | None = None,
    benign: pd.DataFrame | None = None,
    margin: float = MARGIN,
) -> Left:
    """`Left` from item tables (columns item and value) of the models."""
    against = base if control is None else control
    rise = None if organism is None else difference(organism, against)
    tables = None if organism is None else (_by_item(corrected), _by_item(organism), _by_item(against))
    return Left.of(
        over_base=difference(corrected, base),
        over_control=None if control is None else difference(corrected, control),
        rise=rise,
        values=tables,
        over_benign=None if benign is None else difference(corrected, benign),
        margin=margin,
    )


def difference(left: pd.DataFrame, right: pd.DataFrame) -> Estimate:
    """Contrast index of one item table minus that of another, paired by question."""
    both = pd.concat([left.assign(arm="left", seed=0, step=0), right.assign(arm="right", seed=0, step=0)])
    return arm_effect(both, "left", "right")


def item_values(evals: pd.DataFrame, arm: str) -> pd.Series:
    """Contrast value of each item at an arm's last step, averaged over seeds."""
    return final_values(evals, arm).set_index("item")["value"]


def _by_item(table: pd.DataFrame) -> pd.Series:
    return table.groupby("item")["value"].mean()


def _share(corrected: pd.Series, organism: pd.Series, against: pd.Series) -> Estimate:
    """Ratio of mean differences, resampled by question."""
    wide = pd.concat([corrected, organism, against], axis=1, join="inner").to_numpy()
    left, rise = wide[:, 0] - wide[:, 2], wide[:, 1] - wide[:, 2]

    def ratio(draw: np.ndarray) -> float:
        places = draw.astype(int)
        return float(left[places].mean() / rise[places].mean())

    return bootstrap_statistic(np.arange(len(wide)), ratio)


# --- The numbers of one correction over its steps


def outcome(
    readings: pd.DataFrame,
    evals: pd.DataFrame,
    base_evals: pd.DataFrame,
    band: Band,
    feature: str = FEATURE,
    *,
    control_evals: pd.DataFrame | None = None,
    margin: float = MARGIN,
) -> dict[str, Any]:
    """The numbers of one correction (one arm and seed), as plain JSON values.

    Args:
        evals: item table of every step; the first is the organism.
        control_evals: the control arm's items; None holds behaviour against the base alone.
        margin: share of the organism's rise that may be left where behaviour is back.

    Returns:
        steps taken; `index_minus_base`, `index_minus_control` and `start_minus_base` (contrast index, nats per token,
        paired by item, with interval); `behaviour` (the word of `verdicts.restored`), `share_left` (of the organism's
        rise) and `behaviour_back` (whether the word is `restored`); the feature's last reading, its band and
        `in_band`; `steps_to_band` and `steps_to_behaviour`, the first step from which each stays so until the end
        (None: not by the end); explained variance at the end. Without evals all of behaviour is None.
    """
    curve = readings[readings["feature"] == feature].sort_values("step")
    last, by_step = curve.iloc[-1], left_by_step(evals, base_evals, control_evals, margin)
    mean, end = float(last["mean"]), by_step[max(by_step)] if by_step else None
    start = by_step[min(by_step)] if by_step else None
    back = [left.word == RESTORED for left in by_step.values()]
    return {
        "steps": int(last["step"]),
        "index_minus_base": end.over_base.to_dict() if end else None,
        "index_minus_control": end.over_control.to_dict() if end and end.over_control else None,
        "start_minus_base": start.over_base.to_dict() if start else None,
        "behaviour": end.word if end else None,
        "share_left": end.share.to_dict() if end and end.share else None,
        "behaviour_back": back[-1] if back else None,
        "feature": {"estimate": mean, "ci_low": float(last["ci_low"]), "ci_high": float(last["ci_high"])},
        "band": {"low": band.low, "high": band.high},
        "in_band": band.holds(mean),
        "steps_to_band": _or_none(steps_to_band(curve.assign(feature=FEATURE), band)),
        "steps_to_behaviour": _or_none(first_lasting(list(by_step), back)),
        "explained_variance": float(last["explained_variance"]),
    }


def left_by_step(
    evals: pd.DataFrame, base_evals: pd.DataFrame, control_evals: pd.DataFrame | None = None, margin: float = MARGIN
) -> dict[int, Left]:
    """What is left of the rise at each step that was measured, ascending; the first step is the organism."""
    if evals.empty:
        return {}
    steps = sorted(int(step) for step in evals["step"].unique())
    tables = {step: evals[evals["step"] == step] for step in steps}
    organism = tables[steps[0]]
    return {step: what_is_left(base_evals, t, organism, control_evals, margin=margin) for step, t in tables.items()}


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
