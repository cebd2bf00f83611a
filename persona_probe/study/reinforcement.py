"""A study's arms of reinforcement learning on one axis: reward, hacking, behaviour outside the domain, and reading."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.errors import InputError
from persona_probe.finetune.grpo import END, START, TRAIN
from persona_probe.finetune.organisms import ROLLOUTS
from persona_probe.finetune.organisms import STEPS as LOGGED
from persona_probe.runs import RunFolder
from persona_probe.stats import Estimate, bootstrap_mean

TABLE = "reinforcement.parquet"
COLUMNS = ("arm", "step", "measure", "estimate", "ci_low", "ci_high", "n", "seeds")
GRADED = ("reward", "wrong", "hacked")
RISE = "rise of reward"


def reinforcement_table(run: RunFolder) -> pd.DataFrame:
    """Write reinforcement.parquet from what induce, locate and track left; nothing is computed with a model.

    Returns:
        A row for each arm, kept step and measure, seeds joined, in columns of `COLUMNS`. `reward`, `wrong` and `hacked`
        are means over the answers drawn since the step before (at step 0 over those of the model as it was), with
        intervals over questions; `dead` is the share of groups without variance, `kl` the divergence from the base;
        `index` the contrast index minus the base's (nats per token, evaluation split), with intervals over its
        questions; `reading` the persona feature, whose interval, over the probes, is known with one seed alone. `rise
        of reward` is that of the model as it is deployed, last step minus first, paired by question.

    Raises:
        InputError: no arm of the run was trained by reinforcement learning.
    """
    arms = [name for name, arm in run.config.arms.items() if arm.reward]
    seeds = {arm: [s for s in run.config.seeds if run.has(f"arms/{arm}-s{s}/{ROLLOUTS}")] for arm in arms}
    made = {arm: of_arm for arm, of_arm in seeds.items() if of_arm}
    if not made:
        raise InputError(
            f"{run.path} has no arm of reinforcement learning: run `persona-probe induce` with training.method: grpo"
        )
    tables = {name: run.read_table(f"{name}.parquet") for name in ("evals", "readings") if run.has(f"{name}.parquet")}
    rows = [
        {"arm": arm, "seeds": len(of_arm), **one}
        for arm, of_arm in made.items()
        for one in (*_own(run, arm, of_arm), *_index(tables.get("evals"), arm), *_reading(tables.get("readings"), arm))
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    run.write_table(TABLE, table)
    return table


def _own(run: RunFolder, arm: str, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """From a run's own answers."""
    parts = [(seed, f"arms/{arm}-s{seed}") for seed in seeds]
    answers = pd.concat([run.read_table(f"{place}/{ROLLOUTS}").assign(seed=seed) for seed, place in parts])
    logged = pd.concat([run.read_table(f"{place}/{LOGGED}") for _, place in parts])
    kept = answers[answers["phase"].isin([START, TRAIN])]
    steps = [0, *run.config.training.schedule]
    for last, step in zip([-1, *steps], steps, strict=False):
        since = kept[(kept["step"] > last) & (kept["step"] <= step)]
        for measure in GRADED:
            values = since[since[measure].notna()]
            yield from _row(
                step, measure, bootstrap_mean(values[measure].tolist(), values["row"].tolist()) if len(values) else None
            )
        for measure in ("dead", "kl"):
            seen = logged.loc[(logged["step"] > last) & (logged["step"] <= step), measure].dropna()
            yield from _row(
                step, measure, Estimate(float(seen.mean()), np.nan, np.nan, len(seen)) if len(seen) else None
            )
    ends = answers[answers["phase"].isin([START, END])].groupby(["phase", "seed", "row"])["reward"].mean()
    rise = (ends[END] - ends[START]).reset_index()
    yield from _row(steps[-1], RISE, bootstrap_mean(rise["reward"].tolist(), rise["row"].tolist()))


def _row(step: int, measure: str, found: Estimate | None) -> Iterator[dict[str, Any]]:
    if found is not None:
        yield {"step": step, "measure": measure, **found.to_dict()}


def _index(evals: pd.DataFrame | None, arm: str) -> Iterator[dict[str, Any]]:
    """The contrast index of the evaluation split minus the base's."""
    if evals is None:
        return
    rows = evals[evals["split"] == "evaluation"]
    base = rows[rows["arm"] == "base"].groupby("item")["value"].mean()
    for step, of_step in rows[rows["arm"] == arm].groupby("step"):
        values = of_step["value"] - of_step["item"].map(base)
        yield from _row(int(str(step)), "index", bootstrap_mean(values.tolist(), of_step["item"].tolist()))


def _reading(readings: pd.DataFrame | None, arm: str) -> Iterator[dict[str, Any]]:
    """The persona feature."""
    if readings is None:
        return
    rows = readings[readings["feature"] == "persona"]
    for step, of_step in rows[rows["arm"] == arm].groupby("step"):
        low, high = (float(of_step[c].iloc[0]) if len(of_step) == 1 else np.nan for c in ("ci_low", "ci_high"))
        found = Estimate(float(of_step["mean"].mean()), low, high, int(of_step["n_probes"].sum()))
        yield from _row(int(str(step)), "reading", found)
