"""What mitigations buy and what they cost: misaligned behaviour against the narrow task's gain that is kept."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from persona_probe.report.records import Records
from persona_probe.report.theme import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    empty_figure,
    error_bars,
    finish,
    plain,
)

NAME, TITLE = "mitigation_pareto", "What mitigations prevent, and what they cost"
MISSING = "No mitigations measured: `persona-probe mitigate CONFIG` has not run."
X, Y = ("gain_kept", "gain_kept_low", "gain_kept_high"), ("index_vs_base", "index_vs_base_low", "index_vs_base_high")
COLUMNS = ["kind", "cell", "label", "strength", "seed", "seeds", *X, *Y, "verdict"]
REFERENCES = {"base": "circle", "none": "diamond", "control": "square"}
COLOURS = {
    "prevents": GREEN,
    "prevents by not learning the task": ORANGE,
    "hides": PURPLE,
    "reduces": BLUE,
    "no effect shown": GREY,
    "harms": VERMILLION,
}
"""By verdict: what a reader looks for first. Verdicts that are not here are drawn grey."""


def mitigation_pareto_data(table: pd.DataFrame) -> pd.DataFrame:
    """What is drawn of a grid's table (mitigations.parquet): rows whose gain and index are both known."""
    if table.empty:
        return pd.DataFrame(columns=COLUMNS)
    return table.loc[table[X[0]].notna() & table[Y[0]].notna(), COLUMNS].reset_index(drop=True)


def mitigation_pareto(table: pd.DataFrame) -> go.Figure:
    """Below and to the right is better; small dots are seeds, large ones their mean with its intervals."""
    data = mitigation_pareto_data(table)
    if data.empty:
        return empty_figure(MISSING)
    fig = go.Figure()
    _seeds(fig, data[data["kind"] == "cell"])
    means = data[data["kind"] == "all"]
    tried = means[~means["label"].isin(list(REFERENCES))]
    for verdict in [v for v in COLOURS if v in set(tried["verdict"])] + sorted(set(tried["verdict"]) - set(COLOURS)):
        _means(fig, tried[tried["verdict"] == verdict], COLOURS.get(verdict, GREY), "circle", plain(verdict))
    for label, symbol in REFERENCES.items():
        _means(fig, means[means["label"] == label], BLACK, symbol, label)
    line: Any = {"color": GREY, "dash": "dash", "width": 1}
    fig.add_hline(y=0, line=line)
    fig.add_vline(x=0.5, line=line)
    fig.update_xaxes(title_text="narrow task's gain kept (share of that without a mitigation)")
    fig.update_yaxes(title_text="contrast index minus base (nats per token)")
    return finish(fig, _caption(data), height=560)


def pareto_data(records: Records) -> pd.DataFrame:
    """`mitigation_pareto_data` of a grid's folder."""
    return mitigation_pareto_data(records.mitigations)


def pareto(records: Records) -> go.Figure:
    """`mitigation_pareto` of a grid's folder."""
    return mitigation_pareto(records.mitigations)


def _seeds(fig: go.Figure, rows: pd.DataFrame) -> None:
    """One dot a cell, in its verdict's colour where it has one."""
    fig.add_scatter(
        x=rows[X[0]],
        y=rows[Y[0]],
        customdata=[plain(cell) for cell in rows["cell"]],
        hovertemplate="%{customdata}: gain %{x:.2f}, index %{y:+.3f}<extra></extra>",
        mode="markers",
        marker={"size": 5, "opacity": 0.55, "color": [COLOURS.get(v, BLACK) for v in rows["verdict"]]},
        showlegend=False,
    )


def _means(fig: go.Figure, rows: pd.DataFrame, colour: str, symbol: str, name: str) -> None:
    if rows.empty:
        return
    fig.add_scatter(
        x=rows[X[0]],
        y=rows[Y[0]],
        error_x=error_bars(rows, colour, X),
        error_y=error_bars(rows, colour, Y),
        mode="markers+text",
        marker={"size": 11, "color": colour, "symbol": symbol},
        text=[plain(cell) for cell in rows["cell"]],
        textposition="top right",
        textfont={"size": 11, "color": colour},
        hovertemplate="%{text}: gain %{x:.2f}, index %{y:+.3f}<extra></extra>",
        name=name,
    )


def _caption(data: pd.DataFrame) -> str:
    cells = data[(data["kind"] == "cell") & data["seed"].notna()]
    means = data[(data["kind"] == "all") & ~data["label"].isin(list(REFERENCES))]
    seeds, kinds = cells["seed"].nunique(), len(means)
    said = means["verdict"].value_counts()
    verdicts = ", ".join(f"{count} {plain(word)}" for word, count in said.items())
    there = [name for name in REFERENCES if name in set(data["label"])]
    return (
        f"{kinds} mitigations and strengths against the same inducing data; small dots: n = {len(cells)} runs of "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}; large ones: their means, with 95% intervals over questions and "
        "seeds. Vertical: contrast index of the evaluation split minus the base's; on the dashed line a model behaves "
        "like the base. Horizontal: gain on held-out questions of the narrow task, over the gain without a mitigation; "
        f"left of the dashed line less than half is kept. Verdicts: {verdicts or 'none'}. "
        f"References: {', '.join(there) or 'none'} (control: correct answers to the same questions)."
    )
