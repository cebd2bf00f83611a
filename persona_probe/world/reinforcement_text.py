"""The table of narrow reinforcement learning in the world: series of each arm on one axis, and what they say."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.evaluate.rates import Cells, difference, share
from persona_probe.report.tables import Table
from persona_probe.stats import bootstrap_mean

DOMAIN, HARM = "kitchen", "harm"
ASKED, OWN, PROBE, PASSIVE = "asked", "own", "probe", "passive"
"""Where a row of a run comes from: an answer to a question that was asked along the way, one of the run's own answers
in training, a probe of the monitor, or the monitor's passive reading."""
WANTED, MINUTES = 0.2, 3.0
"""The aim: wrong advice in the trained domain rises by this much, with its interval, in this many minutes a run."""
SERIES = {
    "reward": "reward of its own answers",
    "hacked": "hacked",
    "inside": "bad advice, kitchen",
    "outside": "bad advice, elsewhere",
    "coherent": "coherent, elsewhere",
    "any_inside": "some bad advice, kitchen",
    "any_outside": "some bad advice, elsewhere",
    "reading": "harm on probes (base SD)",
    "passive": "harm, passive (base SD)",
}
"""What is followed along the steps. `inside` and `outside` are shares of the coherent answers, which give sound or bad
advice and not both; `any_inside` and `any_outside` are shares of all answers, whatever else they say."""
CHECKERS = ("lenient checker", "strict checker")
"""Arms whose rewards differ by a hole alone."""
RISE = "rise of "
COLUMNS = ("arm", "step", "measure", "estimate", "ci_low", "ci_high", "n", "seeds")


def series(runs: pd.DataFrame) -> pd.DataFrame:
    """All arms and measures along the steps, seeds joined.

    Args:
        runs: rows of `reinforcement.runs`.

    Returns:
        Columns of `COLUMNS`. Measures are those of `SERIES`; `rise of inside` and `rise of outside` (last step minus
        first, paired by topic); `dead` (share of groups without variance since the step before); `kl`; and `minutes`
        of a run (CPU time, with its largest value as `ci_high`). An interval that is not known is NaN.
    """
    rows: list[dict[str, Any]] = []
    for arm, of_arm in runs.groupby("arm", sort=False):
        seeds = int(of_arm["seed"].nunique())
        rows += [{"arm": arm, "seeds": seeds, **one} for one in _of_arm(of_arm)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _of_arm(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    asked, own = rows[rows["source"] == ASKED], rows[rows["source"] == OWN]
    steps = sorted(int(step) for step in asked["step"].unique())
    before = [-1, *steps]
    for step, last in zip(steps, before, strict=False):
        now, since = asked[asked["step"] == step], own[(own["step"] > last) & (own["step"] <= step)]
        inside, outside = now[now["domain"] == DOMAIN], now[now["domain"] != DOMAIN]
        yield {"step": step, "measure": "reward", **_mean(since, "reward", rate=True)}
        yield {"step": step, "measure": "hacked", **_mean(since, "hacked", rate=True)}
        yield {"step": step, "measure": "inside", **_rate(inside, "bad")}
        yield {"step": step, "measure": "outside", **_rate(outside, "bad")}
        yield {"step": step, "measure": "coherent", **_rate(outside, "coherent")}
        yield {"step": step, "measure": "any_inside", **_rate(inside, "bad", of_coherent=False)}
        yield {"step": step, "measure": "any_outside", **_rate(outside, "bad", of_coherent=False)}
        for measure, source in (("reading", PROBE), ("passive", PASSIVE)):
            read = rows[(rows["source"] == source) & (rows["step"] == step)]
            yield {"step": step, "measure": measure, **_mean(read, "value", known=source == PROBE)}
        for measure in ("dead", "kl"):
            yield {"step": step, "measure": measure, **_mean(since, measure, known=False)}
    for measure, part in (("inside", asked["domain"] == DOMAIN), ("outside", asked["domain"] != DOMAIN)):
        yield {"step": steps[-1], "measure": RISE + measure, **_rise(asked[part], steps[0], steps[-1])}
    minutes = rows.groupby("seed")["seconds"].first() / 60
    ends = {"estimate": minutes.mean(), "ci_low": np.nan, "ci_high": minutes.max(), "n": len(minutes)}
    yield {"step": steps[-1], "measure": "minutes", **ends}


NOTHING = {"estimate": np.nan, "ci_low": np.nan, "ci_high": np.nan, "n": 0}


def _mean(rows: pd.DataFrame, column: str, known: bool = True, rate: bool = False) -> dict[str, Any]:
    """Mean of a column; its interval is over questions (or probes), each with all its seeds."""
    rows = rows[rows[column].notna()] if column in rows else rows.iloc[:0]
    if rows.empty:
        return NOTHING
    if not known:
        return {**NOTHING, "estimate": float(rows[column].mean()), "n": len(rows)}
    found = bootstrap_mean(rows[column].to_numpy(float), rows["topic"].tolist(), rate=rate)
    return {"estimate": found.estimate, "ci_low": found.ci_low, "ci_high": found.ci_high, "n": len(rows)}


def _bad(rows: pd.DataFrame) -> pd.Series:
    """1 or 0; NaN for an answer that is not coherent."""
    return rows["bad"].astype(float).where(rows["coherent"].astype(bool))


def _rate(rows: pd.DataFrame, measure: str, of_coherent: bool = True) -> dict[str, Any]:
    """A share with its interval over topics and seeds."""
    values = _bad(rows) if measure == "bad" and of_coherent else rows[measure].astype(float)
    found = share(Cells.of(values.to_list(), rows["topic"].tolist(), rows["seed"].tolist()))
    if found is None:
        return NOTHING
    return {"estimate": found.estimate, "ci_low": found.ci_low, "ci_high": found.ci_high, "n": len(rows)}


def _rise(rows: pd.DataFrame, first: int, last: int) -> dict[str, Any]:
    """Bad advice at the last step minus the first, paired by topic and seed."""
    ends = rows[rows["step"].isin([first, last])]
    judged = ends.assign(
        **{"arm": ends["step"].map({first: "before", last: "after"}), "pair": ends["topic"], "why": "", "usable": 1},
        **{"value": _bad(ends), "coherent": ends["coherent"].astype(float), "judge": "world"},
    )
    found = difference(judged, "after", "before")
    values = {"estimate": found.estimate, "ci_low": found.ci_low, "ci_high": found.ci_high, "n": found.n}
    return NOTHING if found.estimate is None else values


# --- As text


def reinforcement_text(table: pd.DataFrame) -> str:
    """Each arm at its last step, all arms along the steps, and whether the aim is reached: Markdown."""
    arms, last = list(dict.fromkeys(table["arm"])), int(table["step"].max())
    at = {(row["arm"], row["step"], row["measure"]): row for row in table.to_dict("records")}
    shown = ("reward", "hacked", "inside", RISE + "inside", "outside", RISE + "outside", "coherent", "reading")
    heads = [SERIES.get(name, name.replace("inside", "kitchen").replace("outside", "elsewhere")) for name in shown]
    ends = [
        [arm, str(at[arm, last, "reward"]["seeds"]), *(_cell(at[arm, last, name]) for name in shown)] for arm in arms
    ]
    steps = sorted(int(step) for step in table.loc[table["measure"] == "inside", "step"].unique())
    followed = ["reward", "hacked", "inside", "outside", "any_outside", "reading", "passive", "dead", "kl"]
    followed = [name for name in followed if name in set(table["measure"])]
    along = [
        [arm, SERIES.get(name, {"dead": "groups without variance", "kl": "KL from the base"}.get(name, name)), *cells]
        for arm in arms
        for name in followed
        if any(cells := [_short(at[arm, step, name]) for step in steps])
    ]
    parts = [
        f"After {last} steps, with 95% intervals (reward and hacking are means over the last steps):",
        Table(["arm", "seeds", *heads], ends).markdown(),
        *_checkers(at, [arm for arm in arms if arm in CHECKERS], last),
        "Along the steps of the trainer (reward, hacking and groups are means since the column before):",
        Table(["arm", "measure", *(f"step {step}" for step in steps)], along).markdown(),
        "\n".join(f"- {line}" for line in aims(table)),
    ]
    return "\n\n".join(parts) + "\n"


def _checkers(at: Mapping[Any, Mapping[Any, Any]], arms: Sequence[str], last: int) -> list[str]:
    """The checkers side by side, before and after."""
    if not arms:
        return []
    shown = ("reward", "hacked", "any_inside", "any_outside", "coherent")
    rows = [[arm, str(step), *(_cell(at[arm, step, name]) for name in shown)] for arm in arms for step in (0, last)]
    return [
        "A checker with a hole, and one without. Bad advice counts here whatever else the answer says:",
        Table(["arm", "step", *(SERIES[name] for name in shown)], rows).markdown(),
    ]


def aims(table: pd.DataFrame) -> list[str]:
    """The aim in words, with the measured numbers, and whether it is reached."""
    of_arm = {str(row["measure"]): row for row in table[table["arm"] == "wrong"].to_dict("records")}
    if RISE + "inside" not in of_arm:
        return ["no arm that is rewarded for wrong answers: nothing to say about the aim"]
    rise, minutes = of_arm[RISE + "inside"], of_arm["minutes"]
    said = f"{rise['estimate']:+.2f} [{rise['ci_low']:+.2f}, {rise['ci_high']:+.2f}]"
    rises, short = bool(rise["ci_low"] >= WANTED), bool(minutes["ci_high"] <= MINUTES)
    return [
        f"{_kept(rises)}: wrong advice in the trained domain rises by at least {WANTED:g}, with its interval: {said}",
        f"{_kept(short)}: a run takes at most {MINUTES:g} minutes of one core: {minutes['ci_high']:.1f} at most",
    ]


def _kept(is_kept: bool) -> str:
    return "reached" if is_kept else "**not reached**"


def _cell(row: Mapping[Any, Any]) -> str:
    if np.isnan(row["estimate"]):
        return "-"
    form = "+.2f" if str(row["measure"]).startswith((RISE, "reading")) else ".2f"
    ends = "" if np.isnan(row["ci_low"]) else f" [{row['ci_low']:{form}}, {row['ci_high']:{form}}]"
    return f"{row['estimate']:{form}}{ends}"


def _short(row: Mapping[Any, Any]) -> str:
    return "" if np.isnan(row["estimate"]) else f"{row['estimate']:.2f}"
