"""Two judges on the same answers: each model's misalignment rate by one against the other's."""

from itertools import combinations

import pandas as pd
import plotly.graph_objects as go

from persona_probe.evaluate.agreement import ANSWER, MODEL, agreements
from persona_probe.evaluate.rates import rates as rate_table
from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import GREY, empty_figure, finish, interval_marks, interval_text, plain

MISSING = "Agreement of judges not measured: no two judges have ruled on the same answers."
ENDS = ["rate", "ci_low", "ci_high", "counted"]
SIDES = ("left", "right")
COLUMNS = [*SIDES, *MODEL, *(f"{name}_{side}" for side in SIDES for name in ENDS)]
LEFT, RIGHT = (tuple(f"{name}_{side}" for name in ENDS[:3]) for side in SIDES)
PAIR_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")


def judge_agreement_data(records: Records) -> pd.DataFrame:
    """One row per pair of judges and model (an arm, seed and kind of question): both rates, with intervals."""
    parts = {str(name): rows for name, rows in records.judged.groupby("evaluation", sort=False)}
    tables = [_pair(a, b) for a, b in combinations(parts.values(), 2)]
    tables = [table for table in tables if not table.empty]
    return pd.concat(tables, ignore_index=True)[COLUMNS] if tables else pd.DataFrame(columns=COLUMNS)


def _pair(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    if left[ANSWER].merge(right[ANSWER], on=ANSWER).empty:
        return pd.DataFrame()
    sides = [rate_table(rows, MODEL)[[*MODEL, *ENDS]].dropna(subset=["rate"]) for rows in (left, right)]
    table = sides[0].merge(sides[1], on=MODEL, suffixes=("_left", "_right"))
    return table.assign(left=_label(left), right=_label(right))


def _label(rows: pd.DataFrame) -> str:
    return f"{rows['judge'].iloc[0]} ({rows['evaluation'].iloc[0]})"


@figure(
    name="judge_agreement",
    title="Where judges agree",
    group="judged",
    place=30,
    data=judge_agreement_data,
    missing=MISSING,
)
def judge_agreement(records: Records) -> go.Figure:
    """Models as marks in their arm's colour, one symbol for each pair of judges; on the dotted line both agree."""
    data = judge_agreement_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = go.Figure()
    for place, (_, pair) in enumerate(data.groupby(list(SIDES), sort=False)):
        symbol = PAIR_SYMBOLS[place % len(PAIR_SYMBOLS)]
        for (arm,), rows in select.groups(pair, "arm"):
            colour = records.arms.styles[arm].colour
            fig.add_scatter(
                **interval_marks(rows, colour, symbol, 9, LEFT, RIGHT),
                customdata=rows["seed"],
                hovertemplate="seed %{customdata}: %{x:.3f}, %{y:.3f}",
                name=plain(records.arms.label(arm)) + (f", pair {place + 1}" if place else ""),
            )
    fig.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line={"color": GREY, "dash": "dot"}, showlegend=False)
    fig.update_xaxes(title_text="misalignment rate, first judge", rangemode="tozero")
    fig.update_yaxes(title_text="misalignment rate, second judge", rangemode="tozero")
    return finish(fig, _caption(records), height=460)


def _caption(records: Records) -> str:
    pairs = []
    for place, pair in enumerate(agreements(records.judged), 1):
        ranks = "too few models" if pair.rate_correlation is None else f"{pair.rate_correlation:.2f}"
        kappa = "undefined" if pair.kappa is None else interval_text(pair.kappa)
        judges = [_label(select.where(records.judged, evaluation=name)) for name in (pair.left, pair.right)]
        pairs.append(
            f"Pair {place}: {judges[0]} (first) and {judges[1]} (second): kappa {kappa} on n = {pair.answers} "
            f"answers, rank correlation of {pair.models} models' rates {ranks}."
        )
    return (
        "Misalignment rates of the same answers by two judges, a mark for each arm and seed, with 95% intervals over "
        f"questions; on the dotted line both agree. {' '.join(pairs)} Controls: the correct arm, and the base model."
    )
