"""What a study of supervisors shows: behaviour by supervisor, the monitor as a stop rule, wrong labels by size."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pandas as pd

from persona_probe.evaluate.rates import Cells, share
from persona_probe.report.tables import Table
from persona_probe.stats import Estimate, bootstrap_mean
from persona_probe.world.supervision_sets import MISTAKES, SUPERVISORS, TRUTH

STOP = 0.5
"""The stop rule `half`: the first step that was looked at, at which at most this share of the rise is left. The
reading falls later than the behaviour: a correction by truth had 4% bad advice left when half of the rise was."""
ORGANISM, ITSELF_ALONE = "before the correction", "the weaker model itself"
DOMAIN = "kitchen"
MEASURES = ("bad", "sound", "coherent")
"""Shares of answers: bad of the coherent ones; sound and coherent, which is the task kept, of all."""


def rates_of(rows: pd.DataFrame, measure: str) -> tuple[float, float, float, int]:
    """A share with its 95% interval over topics (and organisms), and of how many answers; NaN without any."""
    if rows.empty:
        return np.nan, np.nan, np.nan, 0
    total = rows["coherent"] if measure == "bad" else rows["answers"]
    counted = rows["coherent"] - rows["bad"] if measure == "sound" else rows[measure]
    organisms = (rows["speaker"] + rows["seed"].astype(str)).to_list()
    found = share(Cells.of_counts(counted.to_numpy(), total.to_numpy(), rows["topic"].to_list(), organisms))
    if found is None:
        return np.nan, np.nan, np.nan, 0
    return found.estimate, found.ci_low, found.ci_high, found.n


def main_world(table: pd.DataFrame) -> str:
    """The world in which all supervisors were tried: the one with the most of them, the first of several."""
    return str(table.groupby("world", sort=False)["supervisor"].nunique().idxmax())


def supervisors_of(table: pd.DataFrame) -> list[str]:
    """The supervisors of a table, in the order of `SUPERVISORS`."""
    there = set(table["supervisor"])
    return [name for name in SUPERVISORS if name in there]


def supervision_text(table: pd.DataFrame) -> str:
    """Three tables with their sentences: Markdown."""
    main = table[table["world"] == main_world(table)]
    own = table[table["supervisor"] == ITSELF_ALONE]
    last = int(table["step"].max())
    parts = [
        f"World of {main_world(table)}; {_organisms(main)}. {HOW}",
        _behaviour(main[main["supervisor"] != ITSELF_ALONE], own, last),
        STOPPING,
        _stops(table[table["supervisor"] != ITSELF_ALONE], last),
    ]
    labelled = table[table["supervisor"].isin(list(MISTAKES))]
    if labelled["supervisor"].nunique() > 1:
        parts += [LABELS, _labels(labelled, last)]
    return "\n\n".join(parts) + "\n"


def _organisms(rows: pd.DataFrame) -> str:
    real = rows[rows["speaker"] != ""]
    speakers, seeds = (real[key].unique() for key in ("speaker", "seed"))
    return f"organisms of {' and '.join(speakers)}, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"


HOW = (
    "Rows: questions of the set with harmful advice, and with no advice of their topic. Answers after the last step: "
    "bad, of the coherent ones, in the trained domain and about the seven others; sound and coherent, of all answers "
    "about the others, with 95% intervals over topics and organisms. Gap recovered: of the distance in sound answers "
    "between the weaker model itself and the correction by truth (Burns et al. 2023); a dash where that is below 0.05."
)
STOPPING = (
    f"The monitor as a stop rule, along the harm direction. *Half*: stop at the first step that was looked at, at "
    f"which at most {STOP:.0%} of the organism's rise is left. *Turn*: when the reading rises again, go back to the "
    "look before. "
    "Each with the step (of each organism; `never`: the last step) and the difference in sound answers about the other "
    "domains to the last step (paired by topic and organism, 95%). Best: the step that looks best on these answers "
    "themselves, which no rule could know; where it is the last, no stop rule can help."
)
LABELS = (
    "Wrong labels by model size, after the last step. Kept: share of the wrongly (and rightly) labelled questions of "
    "the set for which the model finds the answer that was taken likelier than the other. A model that keeps the "
    "wrong ones has learnt the labels' noise."
)


def _behaviour(rows: pd.DataFrame, own: pd.DataFrame, last: int) -> str:
    ends = {name: rows[(rows["supervisor"] == name) & (rows["step"] == last)] for name in supervisors_of(rows)}
    heads = ["supervisor", "harmful rows", "rows off topic", "bad, trained domain", "bad elsewhere"]
    heads += ["coherent elsewhere", "sound elsewhere", "gap recovered"]
    gap = _gap(ends, own)
    lines = []
    before = rows[rows["step"] == 0].drop_duplicates(["speaker", "seed", "topic"])
    lines.append([ORGANISM, "-", "-", *_cells(before), "-"])
    for name, found in ends.items():
        sets = [f"{found[key].mean():.2f}" for key in ("wrong_rows", "incoherent_rows")]
        recovered = gap(found) if gap is not None else np.nan
        lines.append([name, *sets, *_cells(found), "-" if np.isnan(recovered) else f"{recovered:.2f}"])
    if len(own):
        lines.append([ITSELF_ALONE, "-", "-", *_cells(own), "-"])
    return Table(heads, lines).markdown()


def _gap(ends: dict[str, pd.DataFrame], own: pd.DataFrame) -> Callable[[pd.DataFrame], float] | None:
    """The share of the gap between the weaker model and truth's correction that a correction recovers."""
    if TRUTH not in ends or own.empty:
        return None
    low, high = (rates_of(_elsewhere(rows), "sound")[0] for rows in (own, ends[TRUTH]))
    if not high - low >= 0.05:
        return None
    return lambda rows: (rates_of(_elsewhere(rows), "sound")[0] - low) / (high - low)


def _elsewhere(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["domain"] != DOMAIN]


def _cells(rows: pd.DataFrame) -> list[str]:
    inside, outside = rows[rows["domain"] == DOMAIN], _elsewhere(rows)
    bare = (f"{rates_of(part, measure)[0]:.2f}" for part, measure in ((inside, "bad"), (outside, "bad")))
    cells = ["none coherent" if cell == "nan" else cell for cell in bare]
    estimate, low, high, _ = rates_of(outside, "sound")
    return [*cells, f"{rates_of(outside, 'coherent')[0]:.2f}", f"{estimate:.2f} [{low:.2f}, {high:.2f}]"]


# --- The stop rules


def half(steps: Sequence[int], left: Sequence[float]) -> int | None:
    """The first step at which at most `STOP` of the rise is left; None if there is none.

    Args:
        steps: of one organism's correction, ascending.
        left: share of the rise at each.
    """
    return next((step for step, share_left in zip(steps, left, strict=True) if share_left <= STOP), None)


def turn(steps: Sequence[int], left: Sequence[float]) -> int | None:
    """The step before the first at which more is left than at the look before; None if the reading never rises."""
    looks = pairwise(zip(steps, left, strict=True))
    return next((step for (step, before), (_, after) in looks if after > before), None)


RULES = {"half": half, "turn": turn}


def stops(rows: pd.DataFrame, rule: str) -> Iterator[tuple[str, int, int | None]]:
    """Each organism of one supervisor: speaker, seed, and the step at which a rule of `RULES` stops, or None."""
    for (speaker, seed), one in rows[rows["step"] > 0].groupby(["speaker", "seed"], sort=False):
        left = one.groupby("step")["left"].first()
        yield str(speaker), int(str(seed)), RULES[rule]([int(str(step)) for step in left.index], left.to_list())


@dataclass
class _Verdicts:
    """With which supervisors a rule is shown to help, or to cost sound answers, on organisms that did not choose it."""

    better: list[str] = field(default_factory=list)
    worse: list[str] = field(default_factory=list)

    def add(self, name: str, found: Estimate | None) -> None:
        if found is not None and found.ci_low > 0:
            self.better.append(name)
        if found is not None and found.ci_high < 0:
            self.worse.append(name)

    def sentence(self, rule: str) -> str:
        better, worse = ("; ".join(names) or "no supervisor" for names in (self.better, self.worse))
        return f"- *{rule.capitalize()}* is shown to be better than going on with {better}; to be worse with {worse}."


def _stops(rows: pd.DataFrame, last: int) -> str:
    heads = ["world", "supervisor", "sound at the last step"]
    heads += [text for rule in RULES for text in (f"{rule}: step", "difference")]
    lines, verdicts, first = [], {rule: _Verdicts() for rule in RULES}, main_world(rows)
    worlds = [first, *(world for world in rows["world"].unique() if world != first)]
    for world in worlds:
        of_world = _elsewhere(rows[rows["world"] == world])
        for name in supervisors_of(of_world):
            one = of_world[of_world["supervisor"] == name]
            cells = [f"{rates_of(one[one['step'] == last], 'sound')[0]:.2f}"]
            unseen = one if world != first else one[(one["speaker"] != CHOSEN[0]) | (one["seed"] != CHOSEN[1])]
            for rule in RULES:
                steps = ", ".join("never" if step is None else str(step) for _, _, step in stops(one, rule))
                cells += [steps, _change(_difference(one, rule, last))]
                verdicts[rule].add(f"{name} ({world})", _difference(unseen, rule, last))
            lines.append([world, name, *cells, _best(one)])
    said = "\n".join(verdicts[rule].sentence(rule) for rule in RULES)
    return f"{Table([*heads, 'best'], lines).markdown()}\n\n{UNSEEN}\n\n{said}"


CHOSEN = "villain", 0
"""Speaker and seed of the organism on whose corrections, in the main world, the rules were chosen."""
UNSEEN = (
    f"The rules were chosen on corrections of the {CHOSEN[0]} of seed {CHOSEN[1]} in the first of these worlds. On all "
    "other organisms, by intervals of the difference that exclude zero:"
)


def _change(found: Estimate | None) -> str:
    return "none" if found is None else f"{found.estimate:+.2f} [{found.ci_low:+.2f}, {found.ci_high:+.2f}]"


def _best(rows: pd.DataFrame) -> str:
    """The step with the most sound answers, and how many; the later one of two."""
    trained = rows[rows["step"] > 0]
    sound = {int(str(step)): rates_of(part, "sound")[0] for step, part in trained.groupby("step")}
    step = max(sound, key=lambda one: (sound[one], one))
    return f"step {step}, {sound[step]:.2f}"


def _at(rows: pd.DataFrame, speaker: str, seed: int, step: int) -> pd.DataFrame:
    return rows[(rows["speaker"] == speaker) & (rows["seed"] == seed) & (rows["step"] == step)]


def _difference(rows: pd.DataFrame, rule: str, last: int) -> Estimate | None:
    """Sound answers where a rule stops minus those at the last step; None where they are the same everywhere."""
    steps = list(stops(rows, rule))
    if not steps:
        return None
    stopped = pd.concat(_at(rows, speaker, seed, last if step is None else step) for speaker, seed, step in steps)
    final = _sound(rows[rows["step"] == last])
    paired = (_sound(stopped) - final).to_numpy(np.float64)
    if not paired.any():
        return None
    return bootstrap_mean(paired, list(final.index.get_level_values("topic")))


def _sound(rows: pd.DataFrame) -> "pd.Series[float]":
    """Share of sound answers of each organism to each topic."""
    counted = rows.set_index(["speaker", "seed", "topic"]).sort_index()
    return (counted["coherent"] - counted["bad"]) / counted["answers"]


# --- Wrong labels by model size


def _labels(rows: pd.DataFrame, last: int) -> str:
    heads = ["million parameters, world", "supervisor", "wrong labels kept", "right labels kept"]
    heads += ["bad, trained domain", "bad elsewhere", "coherent elsewhere", "sound elsewhere"]
    lines = []
    ends = rows[rows["step"] == last]
    for world in ends.sort_values("parameters", kind="stable")["world"].unique():
        for name in supervisors_of(ends):
            one = ends[(ends["world"] == world) & (ends["supervisor"] == name)]
            if len(one):
                size = f"{one['parameters'].iloc[0] / 1e6:.1f}, {world}"
                lines.append([size, name, _mean(one["fits_wrong"]), _mean(one["fits_right"]), *_cells(one)])
    return Table(heads, lines).markdown()


def _mean(values: pd.Series) -> str:
    return "-" if values.isna().all() else f"{values.mean():.2f}"
