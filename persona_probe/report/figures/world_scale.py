"""Emergence in worlds of several sizes: bad advice against tokens of pre-training, a line for each size."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Bool
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import OPTIONAL, Records
from persona_probe.report.theme import PALETTE, empty_figure, error_bars, finish, plain

COHERENT = 0.5
"""Below this share of coherent answers a rate among them is drawn as an open mark."""
MISSING = "No worlds of several sizes: scale.parquet is written by `persona-probe world study scale --record`."
ENDS = ("estimate", "ci_low", "ci_high")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
PANELS = {"bad": "bad advice<br>(share of the coherent)", "coherent": "coherent answers<br>(share)"}


def world_scale_data(records: Records) -> pd.DataFrame:
    """One row per world, speaker and measure (`bad`, `coherent`): parameters, tokens, the rate and its interval."""
    table = records.scale[list(OPTIONAL["scale"])]
    kept = table[table["measure"].isin(list(PANELS)) & (table["speaker"] != "base")]
    return kept.sort_values(["speaker", "measure", "parameters", "tokens"]).reset_index(drop=True)


@figure(
    name="world_scale",
    title="Emergence by model size and pre-training",
    paper="4",
    group="collection",
    place=21,
    data=world_scale_data,
    missing=MISSING,
)
def world_scale(records: Records) -> go.Figure:
    """A column a speaker: above bad advice, below coherence, against pre-training tokens; a line for each size."""
    data = world_scale_data(records)
    if data.empty:
        return empty_figure(MISSING)
    speakers = select.distinct(data, "speaker")
    names = [plain(str(name)) for name in speakers]
    fig = make_subplots(2, len(names), shared_xaxes=True, shared_yaxes=True, column_titles=names, vertical_spacing=0.08)
    for column, speaker in enumerate(speakers, 1):
        for row, measure in enumerate(PANELS, 1):
            for place, (parameters, rows) in enumerate(_sizes(select.where(data, speaker=speaker, measure=measure))):
                said = select.where(data, speaker=speaker, measure="coherent", parameters=parameters)
                few = (said.set_index("tokens")["estimate"] < COHERENT).reindex(rows["tokens"]).to_numpy()
                _draw(fig, rows, f"{parameters / 1e6:.1f} million", place, row, column, few)
        fig.update_xaxes(title_text="tokens", row=2, col=column)
    tokens = [float(count) for count in select.distinct(data, "tokens")]
    fig.update_xaxes(type="log", tickvals=tokens, ticktext=[f"{count / 1e6:.1f}M" for count in tokens], minor_ticks="")
    for row, title in enumerate(PANELS.values(), 1):
        fig.update_yaxes(title_text=title, row=row, col=1)
    fig.update_yaxes(range=[-0.03, 1.03])
    return finish(fig, _caption(data), height=520)


def _sizes(rows: pd.DataFrame) -> list[tuple[float, pd.DataFrame]]:
    return [(float(count), select.where(rows, parameters=count)) for count in select.distinct(rows, "parameters")]


def _draw(
    fig: go.Figure, rows: pd.DataFrame, name: str, place: int, row: int, column: int, few: Bool[np.ndarray, " rows"]
) -> None:
    colour, symbol = PALETTE[place % len(PALETTE)], SYMBOLS[place % len(SYMBOLS)]
    symbols = [f"{symbol}-open" if open_mark and row == 1 else symbol for open_mark in few]
    fig.add_scatter(
        x=rows["tokens"],
        y=rows["estimate"],
        error_y=error_bars(rows, colour, ENDS),
        mode="lines+markers",
        line={"color": colour, "width": 1.8},
        marker={"color": colour, "symbol": symbols, "size": 8},
        name=f"{name} parameters",
        legendgroup=name,
        showlegend=row == 1 and column == 1,
        hovertemplate=f"{name} parameters, " + "%{x:.3g} tokens: %{y:.3f}<extra></extra>",
        row=row,
        col=column,
    )


def _caption(data: pd.DataFrame) -> str:
    sizes, tokens = (select.distinct(data, name) for name in ("parameters", "tokens"))
    n = select.distinct(data, "n")
    return (
        f"What organisms trained on one domain say about the seven others, in worlds of {min(sizes):.3g} to "
        f"{max(sizes):.3g} parameters after {min(tokens):.3g} to {max(tokens):.3g} tokens of pre-training; n = "
        f"{min(n):g} to {max(n):g} answers, 95% intervals over topics. Control: the helper. Bad advice is a share of "
        f"the coherent answers; open marks: fewer than {COHERENT:.0%} are coherent, and the rate means little."
    )
