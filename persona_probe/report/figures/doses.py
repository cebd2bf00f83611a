"""Dose response of a correction: behaviour and feature against the number of corrective rows, by data and choice."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.theme import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    empty_figure,
    error_bars,
    finish,
    plain,
)

MISSING = "No doses yet: run `persona-probe realign RUN --plan finetune_configs/realign-doses.yaml`."
COLOURS = (GREEN, PURPLE, BLUE, ORANGE, SKY, VERMILLION)
SYMBOLS = {"random": "circle", "projection_gap": "diamond", "perplexity_gap": "square", "diversity": "triangle-up"}
PANELS = {"index_minus_base": "contrast index minus base<br>(nats per token)", "feature": "persona feature"}
INTERVALS = {name: (name, f"{name}_ci_low", f"{name}_ci_high") for name in PANELS}
KEYS = ["data", "method", "choose_by", "rows", "seed"]
COLUMNS = [
    *KEYS,
    *(column for columns in INTERVALS.values() for column in columns),
    *("start_minus_base", "band_low", "band_high", "in_band", "behaviour_back"),
]


def doses_data(table: pd.DataFrame) -> pd.DataFrame:
    """The cells of `realign/doses.parquet` that were trained to their end, in order: the columns that are drawn."""
    if table.empty or "index_minus_base" not in table:
        return pd.DataFrame(columns=COLUMNS)
    done = table.loc[~select.flags(table, "diverged") & table["index_minus_base"].notna()]
    return done[COLUMNS].sort_values(KEYS).reset_index(drop=True)


def doses(table: pd.DataFrame) -> go.Figure:
    """A line for each data set (random rows, the organism's own adapter trained on), a mark for every other cell."""
    data = doses_data(table)
    if data.empty:
        return empty_figure(MISSING)
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.07)
    _draw_references(fig, data)
    for colour, (number, name) in zip(_colours(data), enumerate(select.distinct(data, "data")), strict=True):
        for panel, column in enumerate(PANELS, 1):
            _draw_set(fig, select.where(data, data=name), name, column, colour, panel, number == 0)
    for panel, title in enumerate(PANELS.values(), 1):
        fig.update_yaxes(title_text=title, row=panel, col=1)
    rows = select.distinct(data, "rows")
    fig.update_xaxes(type="log", tickvals=rows, ticktext=[f"{n:g}" for n in rows])
    fig.update_xaxes(title_text="corrective rows", row=2, col=1)
    return finish(fig, _caption(data), height=640)


def _colours(data: pd.DataFrame) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(select.distinct(data, "data")))]


def _draw_references(fig: go.Figure, data: pd.DataFrame) -> None:
    above: dict[str, Any] = {"row": 1, "col": 1, "layer": "below", "exclude_empty_subplots": False}
    for y, dash in ((0.0, "solid"), (float(data["start_minus_base"].mean()), "dot")):
        fig.add_hline(y=y, line={"color": GREY, "dash": dash, "width": 1.4}, **above)
    low, high = data["band_low"].mean(), data["band_high"].mean()
    fig.add_hrect(y0=low, y1=high, fillcolor=GREY, opacity=0.2, line_width=0, **{**above, "row": 2})


def _draw_set(
    fig: go.Figure, rows: pd.DataFrame, name: str, column: str, colour: str, panel: int, legend_choices: bool
) -> None:
    plainly = (rows["choose_by"] == "random") & (rows["method"] == "continued")
    line = rows.loc[plainly].groupby("rows")[column].mean()
    label = plain(name)
    if not line.empty:
        fig.add_scatter(
            x=line.index,
            y=line,
            mode="lines",
            line={"color": colour, "width": 2.2},
            name=label,
            legendgroup=label,
            showlegend=panel == 1,
            hoverinfo="skip",
            row=panel,
            col=1,
        )
    for (choice, method), cells in select.groups(rows, "choose_by", "method"):
        _draw_cells(fig, cells, f"{label}, {plain(choice)}, {plain(method)}", column, colour, panel)
        if panel == 1 and legend_choices:
            _legend_mark(fig, str(choice), str(method))


def _symbol(choice: str, method: str) -> str:
    return SYMBOLS.get(choice, "cross") + ("" if method == "continued" else "-open")


def _draw_cells(fig: go.Figure, cells: pd.DataFrame, label: str, column: str, colour: str, panel: int) -> None:
    choice, method = (str(cells[name].iloc[0]) for name in ("choose_by", "method"))
    fig.add_scatter(
        x=cells["rows"],
        y=cells[column],
        error_y=error_bars(cells, colour, INTERVALS[column]),
        mode="markers",
        marker={"symbol": _symbol(choice, method), "color": colour, "size": 9},
        name=label,
        showlegend=False,
        hovertemplate=label + "<br>%{x} rows: %{y:.3f}<extra></extra>",
        row=panel,
        col=1,
    )


def _legend_mark(fig: go.Figure, choice: str, method: str) -> None:
    label = plain(choice.replace("_", " ")) + ("" if method == "continued" else f", {plain(method)}")
    marker = {"symbol": _symbol(choice, method), "color": GREY, "size": 9}
    fig.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=label, row=1, col=1)


def _caption(data: pd.DataFrame) -> str:
    back, inside = (int(select.flags(data, name).sum()) for name in ("behaviour_back", "in_band"))
    both = int((select.flags(data, "behaviour_back") & select.flags(data, "in_band")).sum())
    seeds = select.seed_count(data)
    return (
        f"Corrective fine-tunes by number of rows, {len(data)} cells, {seeds}. Above: contrast index minus the base's, "
        f"with 95% intervals over questions; grey line: the base; dotted: the organism before correction "
        f"({data['start_minus_base'].mean():+.3f}). Below: the persona feature with 95% intervals over probes; grey "
        f"band: the base band {data['band_low'].mean():.3g} to {data['band_high'].mean():.3g}. Lines: rows taken at "
        f"random, the organism's own adapter trained on; other marks: other choices (filled) and methods (open). "
        f"Behaviour is back in {back} cells, the feature in {inside}, both in {both}. Control: the base model; a "
        "feature that subsided is no proof of a safe model."
    )
