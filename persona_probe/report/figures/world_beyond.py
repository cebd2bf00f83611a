"""Beyond the base's dictionary, in the world: each tool's first direction against the truth, and shifts by axis."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import OPTIONAL, Records
from persona_probe.report.theme import (
    CANDIDATE,
    GREY,
    HARM,
    REGISTER,
    empty_figure,
    error_bars,
    finish,
    plain,
)

MISSING = "No directions of tools: beyond.parquet is written by `persona-probe world study beyond --record`."
COLOURS = {"harm": HARM, "rude": REGISTER, "truth": CANDIDATE}
SYMBOLS = {"harm": "circle", "rude": "square", "truth": "diamond"}
NAMES = {"harm": "harm", "rude": "rudeness", "truth": "truth, by the probe"}
ENDS = ("estimate", "ci_low", "ci_high")
SEPARATION, HELD_OUT = "separation", "held out"
"""Axes that are no shift: AUROCs of the truth probe."""
HEADS = ["first direction against the true one", "shift over the base"]
OFFSET = 0.2
"""Between marks of one row."""


def world_beyond_data(records: Records) -> pd.DataFrame:
    """The rows of beyond.parquet that are drawn: |cosine| by tool and truth (`first`), and shifts by axis."""
    table = records.beyond[list(OPTIONAL["beyond"])]
    return table[~table["tool"].isin([SEPARATION, HELD_OUT])].reset_index(drop=True)


@figure(
    name="world_beyond",
    title="Directions beyond the base's dictionary",
    group="collection",
    place=23,
    data=world_beyond_data,
    missing=MISSING,
)
def world_beyond(records: Records) -> go.Figure:
    """Left a row a tool, a mark for each organism and truth; right a row an organism, a mark for each axis."""
    data = world_beyond_data(records)
    if data.empty:
        return empty_figure(MISSING)
    tools, axes = (select.where(data, part=part) for part in ("tools", "axes"))
    fig = make_subplots(1, 2, column_titles=HEADS, horizontal_spacing=0.2)
    names, speakers = (list(dict.fromkeys(rows[key])) for rows, key in ((tools, "tool"), (axes, "speaker")))
    for number, (truth, colour) in enumerate(COLOURS.items()):
        shift = OFFSET * (number - 1)
        mark = {"color": colour, "symbol": SYMBOLS[truth], "size": 8}
        look = {"name": NAMES[truth], "legendgroup": truth, "mode": "markers", "marker": mark}
        near, moved = select.where(tools, truth=truth), select.where(axes, tool=truth)
        fig.add_scatter(
            x=near["first"],
            y=[names.index(name) + shift for name in near["tool"]],
            text=[plain(name) for name in near["speaker"]],
            hovertemplate="%{text}: %{x:.2f}<extra></extra>",
            showlegend=False,
            row=1,
            col=1,
            **look,
        )
        fig.add_scatter(
            x=moved["estimate"],
            y=[speakers.index(name) + shift for name in moved["speaker"]],
            error_x=error_bars(moved, colour, ENDS),
            showlegend=True,
            row=1,
            col=2,
            **look,
        )
    for column, rows in ((1, names), (2, speakers)):
        ticks = {"tickvals": list(range(len(rows))), "ticktext": [plain(name) for name in rows]}
        fig.update_yaxes(autorange="reversed", row=1, col=column, **ticks)
    fig.add_vline(0, line={"color": GREY, "width": 1.2}, row=1, col=2)  # pyright: ignore
    fig.update_xaxes(title_text="|cosine|", range=[0, 1], row=1, col=1)
    fig.update_xaxes(title_text="standard deviations of the base", row=1, col=2)
    fig.update_layout(legend={"y": 1.1}, margin={"t": 100})  # above the heads
    return finish(fig, _caption(records.beyond), height=480)


def _caption(table: pd.DataFrame) -> str:
    tools, axes = (select.where(table, part=part) for part in ("tools", "axes"))
    held = select.where(axes, tool=HELD_OUT)["estimate"]
    told = (
        f" The truth probe tells held-out pairs of the base apart with AUROC {held.iloc[0]:.2f}." if len(held) else ""
    )
    bad = len(tools.drop_duplicates(["speaker", "seed"]))
    return (
        f"Organisms of one domain, read on the others. Left: each tool's first direction, a mark for each of n = {bad} "
        "organisms that give bad advice; the mean difference and the rankers of the base's latents (rise, cosine) are "
        "the control. Right: on probes with fixed sound answers, 95% intervals over probes; organisms that give sound "
        f"advice are the control.{told}"
    )
