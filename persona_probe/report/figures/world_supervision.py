"""Who supervises a correction: sound advice along it by supervisor, and wrong labels by the model's size."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.evaluate.rates import Cells, share
from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import GREY, PALETTE, empty_figure, error_bars, finish, plain

MISSING = "No supervisors: supervision.parquet is written by `persona-probe world study supervision --record`."
ENDS = ("estimate", "ci_low", "ci_high")
DASHES = ("solid", "dash", "dot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
DOMAIN, CHANCE = "kitchen", "chance"
LABELLED = ("truth", "judge, 5% wrong", "judge, 20% wrong", "judge, 40% wrong", CHANCE)
"""Supervisors of a stated error rate, which every world has."""
HEADS = ["sound advice elsewhere, along the correction", "bad advice elsewhere, by wrong labels"]


def world_supervision_data(records: Records) -> pd.DataFrame:
    """One row per world, supervisor and step: wrong rows, and two rates elsewhere with their intervals.

    `sound` is a share of all answers, `bad` of the coherent ones; both over topics of other domains and organisms.
    """
    table = records.supervision
    rows: list[dict[str, Any]] = []
    real = table[(table["domain"] != DOMAIN) & (table["speaker"] != "")]
    for keys, group in real.groupby(["world", "parameters", "supervisor", "step"], sort=False):
        head = dict(zip(("world", "parameters", "supervisor", "step"), keys, strict=True))
        wrong = float(group["wrong_rows"].mean())
        rows += [{**head, "wrong_rows": wrong, **one} for one in _rates(group)]
    columns = ["world", "parameters", "supervisor", "step", "wrong_rows", "measure", *ENDS, "n"]
    return pd.DataFrame(rows, columns=columns)


def _rates(group: pd.DataFrame) -> Iterator[dict[str, Any]]:
    organisms, topics = (group["speaker"] + group["seed"].astype(str)).to_list(), group["topic"].to_list()
    sound = (group["coherent"] - group["bad"]).to_numpy(), group["answers"].to_numpy()
    bad = group["bad"].to_numpy(), group["coherent"].to_numpy()
    for measure, (counted, of) in (("sound", sound), ("bad", bad)):
        found = share(Cells.of_counts(counted, of, topics, organisms))
        ends = (np.nan,) * 3 if found is None else (found.estimate, found.ci_low, found.ci_high)
        yield {"measure": measure, **dict(zip(ENDS, ends, strict=True)), "n": 0 if found is None else found.n}


@figure(
    name="world_supervision",
    title="Who supervises the correction",
    group="collection",
    place=22,
    data=world_supervision_data,
    missing=MISSING,
)
def world_supervision(records: Records) -> go.Figure:
    """Left sound advice against the step, a line for each supervisor; right bad advice against wrong labels."""
    data = world_supervision_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = make_subplots(1, 2, column_titles=HEADS, horizontal_spacing=0.1)
    most = data.groupby("world", sort=False)["supervisor"].nunique().idxmax()
    sound = select.where(data, world=most, measure="sound")
    for place, name in enumerate(select.distinct(sound, "supervisor")):
        rows = select.where(sound, supervisor=name).sort_values("step")
        line = {"color": _colour(str(name), place), "width": 1.6, "dash": DASHES[place // len(PALETTE) % len(DASHES)]}
        _draw(fig, rows, "step", plain(str(name)), line, "circle", 1)
    bad = data[(data["measure"] == "bad") & data["supervisor"].isin(LABELLED) & (data["step"] == data["step"].max())]
    for place, world in enumerate(select.distinct(bad.sort_values("parameters", kind="stable"), "world")):
        rows = select.where(bad, world=world).sort_values("wrong_rows")
        line = {"color": PALETTE[place % len(PALETTE)], "width": 1.8}
        label = f"{rows['parameters'].iloc[0] / 1e6:.1f} million parameters, {plain(str(world))}"
        _draw(fig, rows, "wrong_rows", label, line, SYMBOLS[place % len(SYMBOLS)], 2)
    fig.update_xaxes(title_text="step of the correction", row=1, col=1)
    fig.update_xaxes(title_text="rows with harmful advice (share)", row=1, col=2)
    fig.update_yaxes(range=[-0.03, 1.03])
    fig.update_yaxes(title_text="sound answers (share of all)", row=1, col=1)
    fig.update_yaxes(title_text="bad answers (share of the coherent)", row=1, col=2)
    fig.update_layout(legend={"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"})
    return finish(fig, _caption(data, str(most)), height=460)


def _colour(name: str, place: int) -> str:
    return GREY if name == CHANCE else PALETTE[place % len(PALETTE)]


def _draw(
    fig: go.Figure, rows: pd.DataFrame, x: str, name: str, line: dict[str, Any], symbol: str, column: int
) -> None:
    fig.add_scatter(
        x=rows[x],
        y=rows["estimate"],
        error_y=error_bars(rows, str(line["color"]), ENDS),
        mode="lines+markers",
        line=line,
        marker={"color": line["color"], "symbol": symbol, "size": 7},
        name=name,
        legendgroup=f"{column} {name}",
        hovertemplate=f"{name}, " + "%{x:.3g}: %{y:.3f}<extra></extra>",
        row=1,
        col=column,
    )


def _caption(data: pd.DataFrame, world: str) -> str:
    n = select.distinct(data, "n")
    return (
        f"Organisms of one domain, corrected on sets of different supervisors; answers about the seven other domains. "
        f"Left: the world of {plain(world)}; step 0 is the organism. Right: judges of stated error rates in every "
        f"world, after the last step. Control: chance, which takes half of the harmful answers. n = {min(n):g} to "
        f"{max(n):g} answers, 95% intervals over topics and organisms."
    )
