"""Misaligned and incoherent shares against the number of parameters, from studies of several models."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import INDUCED_STYLES, OPTIONAL, ArmStyle, Records
from persona_probe.report.theme import ORANGE, empty_figure, error_bars, finish, plain

MISSING = "No sizes to compare: sizes.parquet needs judged studies of several models."
PANELS = {
    "misaligned answers<br>(share of the coherent)": ("rate", "rate_low", "rate_high"),
    "incoherent answers<br>(share)": ("incoherent", "incoherent_low", "incoherent_high"),
}


def model_size_data(records: Records) -> pd.DataFrame:
    """One row per model, arm and seed: parameters (a count), both shares with intervals, n answers."""
    table = records.sizes[list(OPTIONAL["sizes"])]
    return table.sort_values(["arm", "parameters", "model", "seed"]).reset_index(drop=True)


@figure(
    name="model_size",
    title="Score by model size",
    paper="4",
    group="collection",
    place=20,
    data=model_size_data,
    missing=MISSING,
)
def model_size(records: Records) -> go.Figure:
    """Above: misaligned share, below: incoherent share; lines join the models' means (Wang et al. 2025, figure 4)."""
    data = model_size_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for row, (title, ends) in enumerate(PANELS.items(), 1):
        for (arm,), rows in select.groups(data, "arm"):
            _draw(fig, rows, _style(str(arm)), ends, row)
        fig.update_yaxes(title_text=title, rangemode="tozero", row=row, col=1)
    fig.update_xaxes(type="log")
    fig.update_xaxes(title_text="parameters", row=2)
    return finish(fig, _caption(data), height=560)


def _style(arm: str) -> ArmStyle:
    return INDUCED_STYLES.get(arm, ArmStyle(ORANGE, "cross", arm))


def _draw(fig: go.Figure, rows: pd.DataFrame, style: ArmStyle, ends: tuple[str, str, str], panel: int) -> None:
    place, label = {"row": panel, "col": 1}, plain(style.label)
    fig.add_scatter(
        x=rows["parameters"],
        y=rows[ends[0]],
        error_y=error_bars(rows, style.colour, ends),
        customdata=[plain(f"{m}, seed {s}") for m, s in zip(rows["model"], rows["seed"], strict=True)],
        hovertemplate="%{customdata}: %{y:.3f}",
        mode="markers",
        marker={"color": style.colour, "symbol": style.symbol, "size": 8},
        name=label,
        legendgroup=label,
        showlegend=panel == 1,
        **place,
    )
    means = rows.groupby("parameters")[ends[0]].mean()
    line = {"mode": "lines", "line": {"color": style.colour, "width": 1.6}, "hoverinfo": "skip"}
    fig.add_scatter(x=means.index, y=means, showlegend=False, legendgroup=label, **line, **place)


def _caption(data: pd.DataFrame) -> str:
    n = select.distinct(data, "n")
    sizes = select.distinct(data, "parameters")
    return (
        f"Misaligned and incoherent shares of {data['model'].nunique()} models of {min(sizes):.3g} to {max(sizes):.3g} "
        f"parameters, {select.seed_count(data)}, n = {min(n)} to {max(n)} answers each, with 95% intervals; lines join "
        "means. Control: the correct arm. Small models are incoherent more often: read both panels together."
    )
