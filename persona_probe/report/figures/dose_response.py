"""Contrast index against signed steering strength, compared with random latents and random directions."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import BASE, Records
from persona_probe.report.theme import DIRECTION, FEATURE, GREY, empty_figure, error_bars, finish, plain

MISSING = "No steering results yet: the locate stage has not run."
STYLES: dict[str, dict[str, Any]] = {
    "random_direction": {"color": GREY, "width": 1, "dash": "dash"},
    "random": {"color": GREY, "width": 1},
    "mean_difference": {"color": DIRECTION, "width": 2.4},
    "candidate": {"color": FEATURE, "width": 2.8},
}
"""Kinds of steering vectors, in the order in which they are drawn."""
LABELS = {
    "random_direction": "random directions",
    "random": "random latents",
    "mean_difference": "mean difference",
    "candidate": "candidate latents",
}


def dose_response_data(records: Records) -> pd.DataFrame:
    """Rows of `steering` that the figure draws: the persona latent, the mean difference and every random control.

    Without a named persona latent, every candidate is kept.
    """
    latent = select.persona_latent(records)
    table = records.steering
    if latent is not None:
        table = table.loc[(table["kind"] != "candidate") | (table["latent"] == latent)]
    return table.sort_values(["model", "kind", "name", "strength"]).reset_index(drop=True)


@figure(
    name="dose_response",
    title="Steering, up and down",
    paper="8",
    group="study",
    place=30,
    data=dose_response_data,
    missing=MISSING,
)
def dose_response(records: Records) -> go.Figure:
    """One panel per steered model; hollow points are outside the perplexity bound."""
    data = dose_response_data(records)
    if data.empty:
        return empty_figure(MISSING)
    start = records.arms.start
    models = {BASE: "base model", start: f"{plain(start)} organism"}
    fig = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.1,
        subplot_titles=[f"steering the {m}" for m in models.values()],
    )
    for panel, model in enumerate(models, 1):
        rows = select.where(data, model=model)
        _draw_unsteered(fig, rows, panel)
        for kind in STYLES:
            for (name,), line in select.groups(select.where(rows, kind=kind), "name"):
                _draw_line(fig, line, str(name), kind, panel)
        fig.update_yaxes(title_text="contrast index<br>(nats per token)", row=panel, col=1)
    _draw_legend(fig, data)
    units = ", ".join(select.distinct(data, "unit"))
    fig.update_xaxes(title_text=f"signed steering strength ({plain(units)})", row=2, col=1)
    fig.update_layout(margin={"t": 96}, legend={"y": 1.06})
    return finish(fig, _caption(data), height=720)


def _draw_unsteered(fig: go.Figure, rows: pd.DataFrame, panel: int) -> None:
    if not rows.empty:
        unsteered = (select.numbers(rows, "estimate") - select.numbers(rows, "delta")).mean()
        place: dict[str, Any] = {"row": panel, "col": 1, "layer": "below", "exclude_empty_subplots": False}
        fig.add_hline(y=unsteered, line={"color": GREY, "dash": "dot", "width": 1.4}, **place)


def _draw_line(fig: go.Figure, line: pd.DataFrame, name: str, kind: str, panel: int) -> None:
    style = STYLES[kind]
    bold, colour = kind in ("candidate", "mean_difference"), style["color"]
    symbols = ["circle" if inside else "circle-open" for inside in select.flags(line, "within_bound")]
    fig.add_scatter(
        x=line["strength"],
        y=line["estimate"],
        error_y=error_bars(line, colour) if bold else None,
        mode="lines+markers",
        line=style,
        marker={"color": colour, "size": 9 if bold else 5, "symbol": symbols},
        opacity=1 if bold else 0.7,
        name=plain(name),
        legendgroup=kind,
        showlegend=False,
        customdata=line["perplexity_ratio"],
        hovertemplate=plain(name) + "<br>strength %{x}: %{y:.3f}<br>perplexity x %{customdata:.2f}<extra></extra>",
        row=panel,
        col=1,
    )


def _draw_legend(fig: go.Figure, data: pd.DataFrame) -> None:
    # lines of their own: a legend mark copies a trace's first point, which may be a hollow one
    for kind, style in reversed(STYLES.items()):
        names = select.distinct(select.where(data, kind=kind), "name")
        if names:
            label = f"persona latent ({plain(names[0])})" if kind == "candidate" and len(names) == 1 else LABELS[kind]
            mark = {"mode": "lines+markers", "line": style, "marker": {"color": style["color"]}, "legendgroup": kind}
            fig.add_scatter(x=[None], y=[None], name=label, **mark)


def _caption(data: pd.DataFrame) -> str:
    names = {kind: len(select.distinct(rows, "name")) for (kind,), rows in select.groups(data, "kind")}
    outside = int((~select.flags(data, "within_bound")).sum())
    return (
        "Contrast index on the evaluation split under steering by the persona latent, with 95% intervals. Controls: "
        f"the mean-difference direction, n = {names.get('random', 0)} random latents of the same norm "
        f"(thin grey) and n = {names.get('random_direction', 0)} random directions (dashed grey). Dotted: unsteered. "
        f"Hollow: the {outside} of {len(data)} points where the perplexity of neutral answers leaves its bound, so the "
        "push damages the model; read the causal effect from filled points only."
    )
