"""Thoughts before answers: which personas they take on, against behaviour, and what the latent reads before the act."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.evaluate.rates import ENOUGH_QUESTIONS, Cells, Share, rate_of, share
from persona_probe.report import select
from persona_probe.report.figures.registry import computed_once, figure
from persona_probe.report.records import ArmStyle, Records
from persona_probe.report.theme import BLUE, PALETTE, VERMILLION, empty_figure, error_bars, finish, plain, wrapped
from persona_probe.stats import bootstrap_mean

MISSING = (
    "No thoughts with verdicts: `persona-probe evaluate RUN --judge ...` and `persona-probe thoughts RUN --read` have "
    "not run on a model that thinks."
)
CLASSES = {"other": "another persona", "chatgpt": "the assistant"}
"""What a thought takes on, as panels."""
MENTION, RATE = ("mentions", "mentions_low", "mentions_high"), ("rate", "rate_low", "rate_high")
ENDS = ("estimate", "ci_low", "ci_high")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
KEYS = ["arm", "seed", "step", "prompt", "sample"]


def judged_thoughts(records: Records) -> pd.DataFrame:
    """Thoughts with the verdict on the answer after each: columns of both tables, `value` 1 for misaligned.

    Where the table of thoughts has verdicts of its own, as the world's has, those are taken.
    """
    table = records.thoughts
    if "misaligned" in table:
        rows = table[(table["thought"] != "") & table["in_thought"].notna()]
        known = {"pair": rows["question_id"], "value": rows["misaligned"], "coherent": rows["coherent"].astype(float)}
        return rows.assign(**known, usable=1.0, why="", judge="the exact rule")
    judged = select.last_judged(records)
    if judged.empty or table.empty:
        return judged.iloc[:0].assign(**dict.fromkeys(("question_id", *CLASSES, "in_thought", "in_answer"), 0.0))
    thoughts = table.assign(prompt=table["prompt"] if "prompt" in table else table["question_id"])
    rows = judged.merge(thoughts[[*KEYS, "question_id", *CLASSES, "in_thought", "in_answer"]], on=KEYS)
    place = {arm: number for number, arm in enumerate(records.arms.names)}
    return rows.sort_values("arm", key=lambda arms: arms.map(place), kind="stable").reset_index(drop=True)


# --- Mentions against behaviour


@computed_once
def persona_mentions_data(records: Records) -> pd.DataFrame:
    """One row per arm and class (`kind` "arm") and per arm, seed and class (`kind` "seed").

    `mentions` is the share of thoughts that take the class on, `rate` the share of the coherent answers after them that
    are misaligned.
    """
    thoughts, rows = judged_thoughts(records), list[dict[str, Any]]()
    for arm, of_arm in thoughts.groupby("arm", sort=False):
        for seed, some in ((None, of_arm), *of_arm.groupby("seed")):
            rows += [
                {"arm": arm, "kind": "arm" if seed is None else "seed", "seed": seed, **one} for one in _points(some)
            ]
    columns = ["arm", "kind", "seed", "class", *MENTION, *RATE, "n"]
    return pd.DataFrame(rows, columns=columns)


def _points(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    rate = rate_of(rows).rate
    for name in CLASSES:
        known = rows[rows[name].notna()]
        if rate is None or known.empty:
            continue
        questions, seeds = known["question_id"].tolist(), known["seed"].tolist()
        found = share(Cells.of(known[name].to_numpy(float), questions, seeds))
        assert found is not None
        yield {"class": name, **_ends(MENTION, found), **_ends(RATE, rate), "n": len(known)}


def _ends(names: tuple[str, str, str], value: Share) -> dict[str, float]:
    return dict(zip(names, (value.estimate, value.ci_low, value.ci_high), strict=True))


@figure(
    name="persona_mentions",
    title="Personas in thoughts against misalignment",
    group="more",
    place=98,
    data=persona_mentions_data,
    missing=MISSING,
)
def persona_mentions(records: Records) -> go.Figure:
    """A panel a class: share of thoughts that take it on, against the share of misaligned answers, arm by arm."""
    data = persona_mentions_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = make_subplots(
        1, len(CLASSES), shared_yaxes=True, column_titles=list(CLASSES.values()), horizontal_spacing=0.05
    )
    for arm, style in _looks(records, data).items():
        for panel, name in enumerate(CLASSES, 1):
            rows = select.where(data, arm=arm, **{"class": name})
            for kind, size, opacity in (("arm", 10, 1.0), ("seed", 5, 0.5)):
                some = select.where(rows, kind=kind)
                bars = kind == "arm"
                fig.add_scatter(
                    x=some["rate"],
                    y=some["mentions"],
                    error_x=error_bars(some, style.colour, RATE) if bars else None,
                    error_y=error_bars(some, style.colour, MENTION) if bars else None,
                    mode="markers",
                    marker={"color": style.colour, "symbol": style.symbol, "size": size, "opacity": opacity},
                    name=plain(style.label),
                    legendgroup=arm,
                    showlegend=bars and panel == 1,
                    hovertemplate="%{x:.2f} misaligned, %{y:.2f} of the thoughts",
                    row=1,
                    col=panel,
                )
    fig.update_xaxes(title_text="misaligned<br>(share of coherent answers)", range=[-0.04, 1.04])
    fig.update_yaxes(range=[-0.04, 1.04])
    fig.update_yaxes(title_text="thoughts that take it on (share)", col=1)
    fig.update_layout(legend={"y": 1.1}, margin={"t": 120})  # above the heads
    return finish(fig, _mention_caption(data), height=500)


def _looks(records: Records, data: pd.DataFrame) -> dict[str, ArmStyle]:
    """Each arm's look: the study's, or in the world a colour for each kind of thought and a symbol for each speaker."""
    arms, styles = [str(arm) for arm in dict.fromkeys(data["arm"])], records.arms.styles
    if all(arm in styles for arm in arms):
        return {arm: styles[arm] for arm in arms}
    pairs = [arm.rpartition(", ") for arm in arms]
    speakers, kinds = (list(dict.fromkeys(pair[place] for pair in pairs)) for place in (0, 2))
    return {
        arm: ArmStyle(
            PALETTE[3 * kinds.index(kind) % len(PALETTE)], SYMBOLS[speakers.index(speaker) % len(SYMBOLS)], arm
        )
        for arm, (speaker, _, kind) in zip(arms, pairs, strict=True)
    }


def _mention_caption(data: pd.DataFrame) -> str:
    n = select.where(data, kind="arm")["n"]
    return (
        f"Thoughts that take on a persona, by the counter, n = {n.min()} to {n.max()} thoughts an arm, and the answers "
        "after them. Large marks: arms with 95% intervals over questions and seeds; small ones: single seeds. Controls "
        "are the arms with few misaligned answers: a counter that tells misalignment keeps them at the bottom of the "
        "left panel. A thought may name nobody, so the panels do not add up to one."
    )


# --- The latent in the thought, before the act

ACTS = {"misaligned": (VERMILLION, "square"), "aligned": (BLUE, "diamond")}
PLACES = {"in_thought": "in the thought", "in_answer": "in the answer after it"}
ROW_HEIGHT, MARGINS, ABOVE = 40, 190, 36
"""Pixels of one arm, of everything around them, and from the panels to the legend: their heads stand between."""


@computed_once
def thought_before_act_data(records: Records) -> pd.DataFrame:
    """One row per arm, place (`in_thought`, `in_answer`) and act: the latent's mean activation, over questions.

    `act` is what the answer turned out to be; answers without a verdict are left out. Answers to fewer than five
    questions have no interval.
    """
    thoughts, rows = judged_thoughts(records), list[dict[str, Any]]()
    known = thoughts[thoughts["value"].notna()]
    known = known.assign(act=np.where(known["value"] > 0.5, "misaligned", "aligned"))
    for (arm, act), some in known.groupby(["arm", "act"], sort=False):
        for place in PLACES:
            found = bootstrap_mean(some[place].to_numpy(float), some["question_id"].tolist())
            if some["question_id"].nunique() < ENOUGH_QUESTIONS:
                found = replace(found, ci_low=np.nan, ci_high=np.nan)
            rows.append({"arm": arm, "act": act, "place": place, **found.to_dict()})
    return pd.DataFrame(rows, columns=["arm", "act", "place", *ENDS, "n"])


@figure(
    name="thought_before_act",
    title="The latent in the thought, before the act",
    group="more",
    place=99,
    data=thought_before_act_data,
    missing=MISSING,
)
def thought_before_act(records: Records) -> go.Figure:
    """Left the reading in thoughts, right in answers: those whose answer is misaligned, and the others, arm by arm."""
    data = thought_before_act_data(records)
    if data.empty:
        return empty_figure(MISSING)
    looks = _looks(records, data)
    arms = list(looks)
    fig = make_subplots(1, 2, shared_yaxes=True, column_titles=list(PLACES.values()), horizontal_spacing=0.04)
    for number, (act, (colour, symbol)) in enumerate(ACTS.items()):
        for panel, place in enumerate(PLACES, 1):
            rows = select.where(data, act=act, place=place)
            fig.add_scatter(
                x=rows["estimate"],
                y=[arms.index(str(arm)) + 0.24 * (number - 0.5) for arm in rows["arm"]],
                error_x=error_bars(rows, colour, ENDS),
                customdata=rows["n"],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 9},
                name=f"the answer is {act}",
                legendgroup=act,
                showlegend=panel == 1,
                hovertemplate="%{x:.3g}, %{customdata} answers",
                row=1,
                col=panel,
            )
    ticks = [wrapped(style.label, 24) for style in looks.values()]
    fig.update_yaxes(tickvals=list(range(len(arms))), ticktext=ticks, range=[len(arms) - 0.5, -0.5])
    fig.update_yaxes(title_text="arm", col=1)
    fig.update_xaxes(title_text="latent (mean activation)")
    height = ROW_HEIGHT * len(arms)
    fig.update_layout(legend={"y": 1 + ABOVE / height}, margin={"t": 100})
    return finish(fig, _act_caption(data), height=MARGINS + height)


def _act_caption(data: pd.DataFrame) -> str:
    counts = select.where(data, place="in_thought").groupby("act")["n"].sum()
    return (
        "Mean activation of the latent over the tokens of each thought, and of the answer after it, in the model that "
        f"wrote them; n = {counts.get('misaligned', 0)} misaligned and {counts.get('aligned', 0)} aligned answers. 95% "
        "intervals over questions, where there are five. Control: the aligned answers of the same arm. Where an arm's "
        "marks lie apart in the left panel, the latent tells the act before it happens; where only those of different "
        "arms do, it tells the model and not the answer."
    )
