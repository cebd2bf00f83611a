"""Three panels over training steps, shared by the trajectory and the re-alignment figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.records import ArmStyle, Records
from persona_probe.report.theme import plain, ribbon

PANELS = {
    "contrast_index": "contrast index<br>(nats per token)",
    "persona": "persona feature<br>(mean activation)",
    "explained_variance": "explained variance<br>(share)",
}
COLUMNS = ["panel", "arm", "seed", "step", "estimate", "ci_low", "ci_high", "n"]


def training_data(records: Records, arms: Sequence[str], references: Sequence[str]) -> pd.DataFrame:
    """Long table of the three panels.

    Rows with a seed are one seed's; without a seed the mean over seeds (contrast index: interval clustered by item).
    Rows without a step are horizontal references: `references`' last-step contrast index and the base band
    (arm "base", panel "persona", `ci_low` to `ci_high`).
    """
    rows = [row for arm in arms for row in (*_contrast_rows(records, arm), *_reading_rows(records, arm))]
    if rows:
        rows += _reference_rows(records, references)
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({"seed": "Int64", "step": "Int64", "n": "Int64"})


def _contrast_rows(records: Records, arm: str) -> list[dict[str, object]]:
    items = select.where(select.evaluation(records), arm=arm)
    head = {"panel": "contrast_index", "arm": arm}
    rows: list[dict[str, object]] = []
    for (step,), group in select.groups(items, "step"):
        rows.append({**head, "step": step, **select.over_items(group).to_dict()})
    for (seed, step), group in select.groups(items, "seed", "step"):
        rows.append(
            {**head, "seed": seed, "step": step, "estimate": select.numbers(group, "value").mean(), "n": len(group)}
        )
    return rows


def _reading_rows(records: Records, arm: str) -> list[dict[str, object]]:
    persona = select.where(records.readings, arm=arm, feature=select.PERSONA)
    rows: list[dict[str, object]] = []
    for panel, column in (("persona", "mean"), ("explained_variance", "explained_variance")):
        for (step,), group in select.groups(persona, "step"):
            mean = {"step": step, "estimate": select.numbers(group, column).mean(), "n": len(group)}
            rows.append({"panel": panel, "arm": arm, **mean})
        for one in persona.sort_values(["seed", "step"]).to_dict("records"):
            row = {"panel": panel, "arm": arm, "seed": one["seed"], "step": one["step"], "n": one["n_probes"]}
            ends = {"ci_low": one["ci_low"], "ci_high": one["ci_high"]} if panel == "persona" else {}
            rows.append({**row, "estimate": one[column], **ends})
    return rows


def _reference_rows(records: Records, references: Sequence[str]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for arm in references:
        if (mean := select.contrast_index(records, arm)) is not None:
            rows.append({"panel": "contrast_index", "arm": arm, **mean.to_dict()})
    if (band := select.base_band(records)) is not None:
        rows.append({"panel": "persona", "arm": "base", "ci_low": band[0], "ci_high": band[1]})
    return rows


def training_figure(data: pd.DataFrame, arms: Sequence[str], styles: Mapping[str, ArmStyle], x_title: str) -> go.Figure:
    """Draw `training_data`: thin lines are seeds, thick lines their mean, grey bands the base model."""
    fig = make_subplots(rows=len(PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.05)
    for row, (panel, title) in enumerate(PANELS.items(), 1):
        rows = select.where(data, panel=panel)
        _draw_references(fig, rows.loc[rows["step"].isna()], styles, row)
        for arm in arms:
            _draw_arm(fig, rows.loc[(rows["arm"] == arm) & rows["step"].notna()], styles[arm], row)
        fig.update_yaxes(title_text=title, row=row, col=1)
    fig.update_xaxes(title_text=x_title, row=len(PANELS), col=1)
    return fig


def _draw_references(fig: go.Figure, rows: pd.DataFrame, styles: Mapping[str, ArmStyle], panel: int) -> None:
    place: dict[str, Any] = {"row": panel, "col": 1, "layer": "below", "exclude_empty_subplots": False}
    for row in rows.to_dict("records"):
        colour = styles[row["arm"]].colour
        if pd.notna(row["estimate"]):
            fig.add_hline(y=row["estimate"], line={"color": colour, "dash": "dot", "width": 1.6}, **place)
        if pd.notna(row["ci_low"]):
            fig.add_hrect(y0=row["ci_low"], y1=row["ci_high"], fillcolor=colour, opacity=0.2, line_width=0, **place)


def _draw_arm(fig: go.Figure, rows: pd.DataFrame, style: ArmStyle, panel: int) -> None:
    if rows.empty:
        return
    colour, label, place = style.colour, plain(style.label), {"row": panel, "col": 1}
    for (seed,), line in select.groups(rows, "seed"):
        _draw_interval(fig, line, colour, panel)
        hover = f"{label}, seed {seed}<br>step %{{x}}: %{{y:.3f}}<extra></extra>"
        thin = {"mode": "lines", "line": {"color": colour, "width": 1}, "opacity": 0.5, "hovertemplate": hover}
        fig.add_scatter(x=line["step"], y=line["estimate"], name=f"seed {seed}", showlegend=False, **thin, **place)
    mean = rows.loc[rows["seed"].isna()]
    _draw_interval(fig, mean, colour, panel)
    fig.add_scatter(
        x=mean["step"],
        y=mean["estimate"],
        name=label,
        legendgroup=label,
        showlegend=panel == 1,
        mode="lines+markers",
        line={"color": colour, "width": 2.6},
        marker={"symbol": style.symbol, "size": 8},
        hovertemplate=f"{label}, mean<br>step %{{x}}: %{{y:.3f}}<extra></extra>",
        **place,
    )


def _draw_interval(fig: go.Figure, line: pd.DataFrame, colour: str, panel: int) -> None:
    known = line.dropna(subset=["ci_low", "ci_high"])
    if not known.empty:
        ends = known["ci_low"].tolist(), known["ci_high"].tolist()
        fig.add_trace(ribbon(known["step"].tolist(), *ends, colour), row=panel, col=1)


def base_words(data: pd.DataFrame) -> str:
    """The base band in words, for captions."""
    band = data.loc[(data["panel"] == "persona") & data["step"].isna()]
    if band.empty:
        return "the base band is not measured yet"
    return f"grey band: the base band {band['ci_low'].iloc[0]:.3g} to {band['ci_high'].iloc[0]:.3g}"
