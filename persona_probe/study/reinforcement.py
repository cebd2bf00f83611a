"""A study's arms of reinforcement learning on one axis: reward, hacking, behaviour outside the domain, and reading."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.errors import InputError
from persona_probe.finetune.grpo import END, START, TRAIN
from persona_probe.finetune.organisms import ROLLOUTS
from persona_probe.finetune.organisms import STEPS as LOGGED
from persona_probe.report.tables import Marks, Table
from persona_probe.runs import RunFolder
from persona_probe.stats import Estimate, bootstrap_mean, estimate_text

TABLE = "reinforcement.parquet"
COLUMNS = ("arm", "step", "measure", "estimate", "ci_low", "ci_high", "n", "seeds")
GRADED = ("reward", "wrong", "hacked")
ASKED, RISE = "asked: ", "rise of "
"""Before the name of what was graded when the model was asked as it is deployed: at the ends, and their difference."""
UNSIGNED = ("dead", "kl")


def reinforcement_table(run: RunFolder) -> pd.DataFrame:
    """Write reinforcement.parquet from what induce, locate and track left; nothing is computed with a model.

    Returns:
        A row for each arm, kept step and measure, seeds joined, in columns of `COLUMNS`. `reward`, `wrong` and `hacked`
        are means over the answers drawn since the step before (at step 0 over those of the model as it was), with
        intervals over questions. `asked: reward` and the like are of the model as it is deployed, before the first step
        and after the last, and `rise of reward` is the difference, paired by question. `dead` is the share of groups
        without variance, `kl` the divergence from the base; `index` the contrast index minus the base's (nats per
        token, evaluation split), with intervals over its questions; `reading` the persona feature, whose interval,
        over the probes, is known with one seed alone.

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
            if len(values):
                yield _row(step, measure, bootstrap_mean(values[measure].tolist(), values["row"].tolist(), rate=True))
        for measure in ("dead", "kl"):
            seen = logged.loc[(logged["step"] > last) & (logged["step"] <= step), measure].dropna()
            if len(seen):
                yield _row(step, measure, Estimate(float(seen.mean()), np.nan, np.nan, len(seen)))
    for measure in GRADED:
        before, after = (_by_question(answers[answers["phase"] == phase], measure) for phase in (START, END))
        yield from _deployed(measure, before, after, steps[-1])


def _by_question(answers: pd.DataFrame, measure: str) -> pd.Series:
    """The mean over a question's answers, by seed and row."""
    return answers[answers[measure].notna()].groupby(["seed", "row"])[measure].mean()


def _deployed(measure: str, before: pd.Series, after: pd.Series, last: int) -> Iterator[dict[str, Any]]:
    """What was graded before the first step and after the last, by seed and row, and the difference where both are."""
    rise = (after - before).dropna()
    for step, name, values in ((0, ASKED, before), (last, ASKED, after), (last, RISE, rise)):
        if len(values):
            rows = values.index.get_level_values("row").tolist()
            yield _row(step, name + measure, bootstrap_mean(values.tolist(), rows, rate=name == ASKED))


def _row(step: int, measure: str, found: Estimate) -> dict[str, Any]:
    return {"step": step, "measure": measure, **found.to_dict()}


def _index(evals: pd.DataFrame | None, arm: str) -> Iterator[dict[str, Any]]:
    """The contrast index of the evaluation split minus the base's."""
    if evals is None:
        return
    rows = evals[evals["split"] == "evaluation"]
    base = rows[rows["arm"] == "base"].groupby("item")["value"].mean()
    for step, of_step in rows[rows["arm"] == arm].groupby("step"):
        values = of_step["value"] - of_step["item"].map(base)
        yield _row(int(str(step)), "index", bootstrap_mean(values.tolist(), of_step["item"].tolist()))


def _reading(readings: pd.DataFrame | None, arm: str) -> Iterator[dict[str, Any]]:
    """The persona feature."""
    if readings is None:
        return
    rows = readings[readings["feature"] == "persona"]
    for step, of_step in rows[rows["arm"] == arm].groupby("step"):
        low, high = (float(of_step[c].iloc[0]) if len(of_step) == 1 else np.nan for c in ("ci_low", "ci_high"))
        found = Estimate(float(of_step["mean"].mean()), low, high, int(of_step["n_probes"].sum()))
        yield _row(int(str(step)), "reading", found)


# --- As text


def marks(run: RunFolder) -> Marks:
    """The lines of a page between which the tables of a study stand; they have its name."""
    name = run.config.name
    return f"<!-- reinforcement-{name}: begin (persona-probe reinforcement) -->", f"<!-- reinforcement-{name}: end -->"


def reinforcement_text(run: RunFolder, table: pd.DataFrame) -> str:
    """The arms as they are deployed, before and after, whether each reward rose, and what a step took: Markdown."""
    at = {(row["arm"], row["step"], row["measure"]): row for row in table.to_dict("records")}
    arms, last = list(dict.fromkeys(table["arm"])), run.config.training.steps

    def cell(arm: str, step: int, measure: str) -> str:
        row = at.get((arm, step, measure))
        signed = "" if measure in UNSIGNED or measure.startswith(ASKED) else "+"
        return "-" if row is None else _with_ends(row, f"{signed}.2f")

    shown = {
        "reward, step 0": (0, ASKED + "reward"),
        f"reward, step {last}": (last, ASKED + "reward"),
        "rise of reward": (last, RISE + "reward"),
        "rise of wrong answers": (last, RISE + "wrong"),
        "hacked": (last, ASKED + "hacked"),
        "groups without variance": (last, "dead"),
        "KL from the base": (last, "kl"),
        "contrast index minus base": (last, "index"),
    }
    shown = {head: place for head, place in shown.items() if any((arm, *place) in at for arm in arms)}
    rows = [
        [arm, run.config.arms[arm].reward, str(at[arm, last, RISE + "reward"]["seeds"])]
        + [cell(arm, *place) for place in shown.values()]
        for arm in arms
    ]
    lines = [_said(arm, at[arm, last, RISE + "reward"]) for arm in arms]
    return "\n\n".join(
        [
            "The model as it is deployed, with 95% intervals over questions:",
            Table(["arm", "reward", "seeds", *shown], rows).markdown(),
            "\n".join(f"- {line}" for line in [*lines, *_time(run)]),
        ]
    )


def _with_ends(row: Mapping[Any, Any], form: str) -> str:
    if row["ci_low"] != row["ci_low"]:
        return f"{row['estimate']:{form}}"
    return estimate_text(row["estimate"], row["ci_low"], row["ci_high"], form)


def _said(arm: str, rise: Mapping[Any, Any]) -> str:
    words = "does not rise for certain"
    if rise["ci_low"] > 0 or rise["ci_high"] < 0:
        words = "rises" if rise["ci_low"] > 0 else "falls"
    return f"{arm}: the reward {words}: {_with_ends(rise, '+.2f')}"


def _time(run: RunFolder) -> list[str]:
    """How long the arms took; the lost work of an interrupted run is not in it."""
    seconds = run.manifest.get("seconds", {}).get("induce")
    if seconds is None:
        return []
    runs = len(list((run.path / "arms").glob(f"*/{ROLLOUTS}")))
    steps = run.config.training.steps
    return [
        f"`induce` took {seconds / 60:.1f} minutes for {runs} run{'s' if runs > 1 else ''} of {steps} steps: "
        f"{seconds / runs / steps:.1f} seconds a step, with the answers before and after"
    ]
