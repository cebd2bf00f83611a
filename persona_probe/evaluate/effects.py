"""Effects between arms, from the item table: the contrast index and paired differences, with intervals."""

import pandas as pd

from persona_probe.errors import InputError
from persona_probe.stats import Estimate, bootstrap_mean, paired_difference


def final_values(evals: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Item by item, the contrast value at each seed's last step, averaged over seeds."""
    rows = evals[evals["arm"] == arm]
    last = rows.groupby("seed")["step"].transform("max")
    return rows[rows["step"] == last].groupby("item")["value"].mean().reset_index()


def final_index(evals: pd.DataFrame, arm: str) -> Estimate:
    """The contrast index of an arm at its last step (nats per token), interval over questions."""
    return bootstrap_mean(final_values(evals, arm)["value"].to_numpy())


def effects_by_seed(evals: pd.DataFrame, left: str, right: str) -> dict[int, Estimate]:
    """`arm_effect` of each seed of `left`; a side without that seed (the base has one) is used whole."""
    return {
        int(seed): arm_effect(pd.concat([_of_seed(evals, left, seed), _of_seed(evals, right, seed)]), left, right)
        for seed in sorted(evals.loc[evals["arm"] == left, "seed"].unique())
    }


def _of_seed(evals: pd.DataFrame, arm: str, seed: int) -> pd.DataFrame:
    rows = evals[evals["arm"] == arm]
    of_seed = rows[rows["seed"] == seed]
    return rows if of_seed.empty else of_seed


def arm_effect(evals: pd.DataFrame, left: str, right: str) -> Estimate:
    """Paired difference of two arms' contrast index on the same questions."""
    pairs = final_values(evals, left).merge(final_values(evals, right), on="item", suffixes=("_left", "_right"))
    return bootstrap_mean((pairs["value_left"] - pairs["value_right"]).to_numpy())


def behaviour_rises(evals: pd.DataFrame) -> pd.DataFrame:
    """How far the contrast index rose over the base, at every step at which it was taken.

    Args:
        evals: columns run, step, item, value (nats per token); every run has the base's items at step 0.

    Returns:
        Columns run, step, rise, ci_low, ci_high: mean over items of value minus the base's, bootstrap over items.

    Raises:
        InputError: a run without step 0, or other items there.
    """
    rows = []
    for run, frame in evals.groupby("run", sort=False):
        wide = frame.pivot(index="item", columns="step", values="value")
        if 0 not in wide or wide.isna().any(axis=None):
            raise InputError(f"run {run!r} has not the same contrast items at every step, step 0 included")
        for step in [s for s in wide if s]:
            rise = paired_difference(wide[step].to_numpy(), wide[0].to_numpy())
            rows.append({"run": run, "step": step, "rise": rise.estimate, **_ends(rise.ci_low, rise.ci_high)})
    return pd.DataFrame(rows)


def _ends(low: float, high: float) -> dict[str, float]:
    return {"ci_low": low, "ci_high": high}
