"""What mitigations prevent and what they cost: misaligned behaviour against the gain kept on the narrow task."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import BLACK, GREY, PALETTE, VERMILLION, empty_figure, finish, interval_marks, plain

MISSING = "No mitigations measured: `persona-probe mitigate CONFIG` has not run."
X, Y = ("gain_kept", "gain_kept_low", "gain_kept_high"), ("index_vs_base", "index_vs_base_low", "index_vs_base_high")
COLUMNS = ["kind", "cell", "label", "strength", "seed", "seeds", *X, *Y, "verdict"]
REFERENCES = {"base": "circle", "none": "diamond", "control": "square"}
COLOURS = {
    "prevents": PALETTE[1],
    "prevents by not learning the task": PALETTE[2],
    "prevents, task undecided": PALETTE[2],
    "hides": PALETTE[3],
    "reduces": PALETTE[0],
    "no effect shown": GREY,
    "harms": VERMILLION,
}
"""By verdict, the most wanted first. Other verdicts are drawn grey."""
ENDS = {"top center": Y[2], "bottom center": Y[1]}
"""Where a label may go, and the end of the interval that is there."""
KEY_FROM = 0.64
"""Share of the width at which the key to the numbers begins."""


def mitigation_pareto_data(records: Records) -> pd.DataFrame:
    """What is drawn of a grid's table (mitigations.parquet): rows whose gain and index are both known."""
    table = records.mitigations
    if table.empty:
        return pd.DataFrame(columns=COLUMNS)
    return table.loc[table[X[0]].notna() & table[Y[0]].notna(), COLUMNS].reset_index(drop=True)


@figure(
    name="mitigation_pareto",
    title="What mitigations prevent, and what they cost",
    group="collection",
    place=70,
    data=mitigation_pareto_data,
    missing=MISSING,
)
def mitigation_pareto(records: Records) -> go.Figure:
    """Below and to the right is better; small dots are seeds, large ones their mean with its intervals."""
    data = mitigation_pareto_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = go.Figure()
    means = data[data["kind"] == "all"]
    cells = means[~means["label"].isin(list(REFERENCES))].sort_values(Y[0])
    cells = cells.assign(mark=[str(number) for number in range(1, len(cells) + 1)])
    cells["colour"] = [COLOURS.get(verdict, GREY) for verdict in cells["verdict"]]
    references = means[means["label"].isin(list(REFERENCES))].assign(colour=BLACK)
    references["mark"] = references["label"]
    for verdict in [v for v in COLOURS if v in set(cells["verdict"])] + sorted(set(cells["verdict"]) - set(COLOURS)):
        rows = cells[cells["verdict"] == verdict]
        _means(fig, rows, COLOURS.get(verdict, GREY), "circle", plain(verdict))
    for label, symbol in REFERENCES.items():
        _means(fig, references[references["label"] == label], BLACK, symbol, label)
    _seeds(fig, data[data["kind"] == "cell"])
    _marks(fig, pd.concat([cells, references]))
    _key(fig, cells)
    line: Any = {"color": GREY, "dash": "dash", "width": 1}
    fig.add_hline(y=0, line=line)
    fig.add_vline(x=0.5, line=line)
    fig.update_xaxes(title_text="narrow task's gain kept (share of none's)")
    fig.update_yaxes(title_text="contrast index minus base (nats per token)")
    return finish(fig, _caption(data), height=560)


def _seeds(fig: go.Figure, rows: pd.DataFrame) -> None:
    """One dot a cell, in its verdict's colour if it has one."""
    fig.add_scatter(
        x=rows[X[0]],
        y=rows[Y[0]],
        customdata=[plain(cell) for cell in rows["cell"]],
        hovertemplate="%{customdata}: gain %{x:.2f}, index %{y:+.3f}<extra></extra>",
        mode="markers",
        marker={
            "size": 5,
            "color": [COLOURS.get(v, BLACK) for v in rows["verdict"]],
            "line": {"width": 1, "color": "#ffffff"},
        },
        showlegend=False,
    )


def _means(fig: go.Figure, rows: pd.DataFrame, colour: str, symbol: str, name: str) -> None:
    if rows.empty:
        return
    fig.add_scatter(
        **interval_marks(rows, colour, symbol, 11, X, Y),
        customdata=[plain(cell) for cell in rows["cell"]],
        hovertemplate="%{customdata}: gain %{x:.2f}, index %{y:+.3f}<extra></extra>",
        name=name,
    )


def _marks(fig: go.Figure, means: pd.DataFrame) -> None:
    """Numbers and names, at the end of the interval that has more room."""
    spread = np.ptp(means[X[0]].to_numpy()) or 1.0, np.ptp(means[Y[0]].to_numpy()) or 1.0
    for place, row in enumerate(means.to_dict("records")):
        others = means.drop(index=means.index[place])
        # without an interval, the mean is both ends
        ends = {side: row[Y[0]] if row[at] != row[at] else row[at] for side, at in ENDS.items()}
        room = {side: _room(row[X[0]], at, others, spread) for side, at in ends.items()}
        side = max(room, key=room.__getitem__)
        fig.add_scatter(
            x=[row[X[0]]],
            y=[ends[side]],
            mode="text",
            text=[row["mark"]],
            textposition=side,
            textfont={"size": 11, "color": row["colour"]},
            hoverinfo="skip",
            showlegend=False,
        )


def _room(x: float, y: float, others: pd.DataFrame, spread: tuple[float, float]) -> float:
    """Distance from a place to the nearest of the other intervals, in shares of the axes."""
    if others.empty:
        return np.inf
    low, high = (others[end].fillna(others[Y[0]]).to_numpy() for end in Y[1:])
    across, above = (others[X[0]].to_numpy() - x) / spread[0], (y - np.clip(y, low, high)) / spread[1]
    return float(np.hypot(across, above).min())


def _key(fig: go.Figure, cells: pd.DataFrame) -> None:
    """Which number is which mitigation, lowest index first, right of the plot: names on the dots would overlap."""
    # lines must fit a column: name the strength only where a mitigation has several
    names = cells["cell"].where(cells.duplicated("label", keep=False), cells["label"])
    lines = [
        f'<span style="color:{colour}">{mark} {plain(name)}</span>'
        for colour, mark, name in zip(cells["colour"], cells["mark"], names, strict=True)
    ]
    fig.update_xaxes(domain=[0, KEY_FROM - 0.02])
    place: dict[str, Any] = {"xref": "paper", "x": KEY_FROM, "xanchor": "left", "yref": "paper", "y": 1}
    fig.add_annotation(
        text="<br>".join(lines), showarrow=False, align="left", yanchor="top", font={"size": 11}, **place
    )


def _caption(data: pd.DataFrame) -> str:
    cells = data[(data["kind"] == "cell") & data["seed"].notna()]
    means = data[(data["kind"] == "all") & ~data["label"].isin(list(REFERENCES))]
    seeds, kinds = cells["seed"].nunique(), len(means)
    counts = means["verdict"].value_counts()
    verdicts = ", ".join(f"{count} {plain(word)}" for word, count in counts.items())
    references = [name for name in REFERENCES if name in set(data["label"])]
    return (
        f"{kinds} mitigations and strengths on the same inducing data, numbered from the lowest index up. Small dots: "
        f"n = {len(cells)} runs of {seeds} {'seed' if seeds == 1 else 'seeds'}; large dots: their means, with 95% "
        "intervals over questions and seeds. Vertical: contrast index on the evaluation split minus the base's; on the "
        "dashed line a model behaves like the base. Horizontal: gain on held-out questions of the narrow task, as a "
        "share of the gain without a mitigation (none); left of the dashed line less than half is kept. "
        f"Verdicts: {verdicts or 'none'}. "
        f"References: {', '.join(references) or 'none'} (control: correct answers to the same questions)."
    )
