"""Effects between arms, from the item table: the contrast index and paired differences, with intervals."""

from dataclasses import dataclass
from math import hypot, sqrt

import pandas as pd
from scipy.stats import chi2, norm

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


LEVEL = 0.7
"""Of the upper bound of a seed's variance. Set on ten short runs of the control arm that `make null` does not use;
`make null` and `make coverage` measure it on others."""


@dataclass(frozen=True)
class SeedNoise:
    """How much a contrast index differs between runs on the same data that differ in their seed alone."""

    variance: float
    """Of one run's index, in (nats per token) squared."""
    df: int
    """Degrees of freedom behind it: 1 for a null pair, runs minus arms where arms have several seeds."""
    source: str
    """Where it comes from, in words."""

    @property
    def upper(self) -> float:
        """Upper end of a one-sided interval of the variance at `LEVEL`: few degrees of freedom make it wide."""
        return self.variance * self.df / float(chi2.ppf(1 - LEVEL, self.df))


def seed_noise(evals: pd.DataFrame, control: str, null: pd.DataFrame | None = None) -> SeedNoise | None:
    """The variance between seeds: of all arms with several seeds, else of a null pair; None without either.

    A null pair's squared difference is twice the variance of one run. Nothing is taken off for the questions, so the
    estimate leans to the wide side.

    Args:
        evals: items by arm, seed and step (columns arm, seed, step, item, value).
        control: the arm of which `null` is another run.
        null: the items of that run.
    """
    last = evals[evals["step"] == evals.groupby(["arm", "seed"])["step"].transform("max")]
    means = last[last["arm"] != "base"].groupby(["arm", "seed"])["value"].mean()
    groups = [group for _, group in means.groupby("arm") if len(group) > 1]
    if groups:
        df = sum(len(group) - 1 for group in groups)
        squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
        return SeedNoise(squares / df, df, f"{df + len(groups)} runs with several seeds an arm")
    if null is None or control == "base":
        return None
    first = final_values(evals, control).merge(null[["item", "value"]], on="item", suffixes=("", "_null"))
    return SeedNoise(float((first["value"] - first["value_null"]).mean()) ** 2 / 2, 1, "a null pair")


def arm_effect(evals: pd.DataFrame, left: str, right: str, noise: SeedNoise | None = None) -> Estimate:
    """Paired difference of two arms' contrast index on the same questions.

    Args:
        noise: what another seed would have done; None leaves it out, and the interval covers questions alone. With it,
            the half-widths for questions and for seeds are added in squares. A variance from one null pair may be far
            too small by luck, so its upper bound is taken, see `SeedNoise.upper`.
    """
    pairs = final_values(evals, left).merge(final_values(evals, right), on="item", suffixes=("_left", "_right"))
    differences = (pairs["value_left"] - pairs["value_right"]).to_numpy()
    effect = bootstrap_mean(differences)
    if noise is None or len(differences) < 2:
        return effect
    runs = sum(1 / _seeds(evals, arm) for arm in (left, right) if arm != "base")
    seeds = float(norm.ppf(0.975)) * sqrt(runs * noise.upper)
    low, high = (
        effect.estimate + sign * hypot(seeds, effect.estimate - end)
        for sign, end in ((-1, effect.ci_low), (1, effect.ci_high))
    )
    return Estimate(effect.estimate, low, high, effect.n)


def _seeds(evals: pd.DataFrame, arm: str) -> int:
    return max(1, evals.loc[evals["arm"] == arm, "seed"].nunique())


def behaviour_rises(evals: pd.DataFrame) -> pd.DataFrame:
    """How far the contrast index rose over the base, at every step at which it was taken.

    Args:
        evals: columns run, step, item, value (nats per token); every run has the base's items at step 0.

    Returns:
        Columns run, step, rise, ci_low, ci_high: mean over items of value minus the base's, interval over items.

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
