"""Screened data: a histogram for each ranker, and the calibration behind the predicted shift."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from persona_probe.report.theme import BLUE, GREY, VERMILLION, empty_figure, finish, plain, ribbon

BINS = 30


@dataclass(frozen=True)
class FittedLine:
    """What the calibration figure draws; the score is a data set's mean."""

    sets: pd.DataFrame
    """Columns data, seed, score, shift: one row a training run."""
    band: pd.DataFrame
    """Columns score, estimate, low, high: the line and its prediction interval over the calibrated range."""
    screened: tuple[float, float | None, float | None, float | None]
    """Score of the screened set, and its prediction if there is one."""
    statement: str
    """What the line was fitted to."""


def histogram(scores: Sequence[float], label: str, limit: int) -> go.Figure:
    """How a ranker's scores are spread over the rows; a dashed line marks where the listed worst rows begin.

    Args:
        scores: one a row; rows without a score are left out and counted in the caption.
        label: the score in words, with its unit.
        limit: how many worst rows are listed.
    """
    values = np.asarray(scores, dtype=float)
    known = values[np.isfinite(values)]
    if known.size == 0:
        return empty_figure("No row has a score.")
    fig = go.Figure()
    fig.add_histogram(x=known, nbinsx=BINS, marker={"color": BLUE}, name="rows", showlegend=False)
    edge = float(np.sort(known)[::-1][min(limit, known.size) - 1])
    fig.add_vline(x=edge, line={"color": VERMILLION, "dash": "dash", "width": 1.6})
    fig.update_xaxes(title_text=plain(label, 90))
    fig.update_yaxes(title_text="rows")
    fig.update_layout(margin={"t": 24}, bargap=0.03)
    missing = f" {values.size - known.size} rows have no score." if known.size < values.size else ""
    return finish(
        fig,
        f"{known.size} rows: mean {known.mean():.3g}, median {np.median(known):.3g}, largest {known.max():.3g}. "
        f"Higher is worse; right of the dashed line lie the {min(limit, known.size)} worst rows.{missing}",
        height=260,
    )


def calibration(line: FittedLine) -> go.Figure:
    """Trained data sets by mean score and measured shift, the fitted line with its interval, and the screened set."""
    fig = go.Figure()
    band = {name: line.band[name].to_list() for name in ("score", "estimate", "low", "high")}
    fig.add_trace(ribbon(band["score"], band["low"], band["high"], BLUE))
    fig.add_scatter(x=band["score"], y=band["estimate"], mode="lines", line={"color": BLUE}, name="least-squares line")
    fig.add_scatter(
        x=line.sets["score"],
        y=line.sets["shift"],
        mode="markers",
        marker={"color": GREY, "size": 9},
        text=[f"{plain(row['data'])}, seed {row['seed']}" for _, row in line.sets.iterrows()],
        hovertemplate="%{text}: %{y:.2f}<extra></extra>",
        name="our training runs",
    )
    _add_screened(fig, *line.screened)
    fig.update_xaxes(title_text="mean projection difference of the training rows (raw units)")
    fig.update_yaxes(title_text="shift of the contrast index (nats per token)")
    caption = (
        f"Mean score of a data set's rows, and what training on it did to the contrast index: {line.statement}. "
        "The line is fitted to data sets, each the mean of its runs; shaded: 95% prediction interval for one more."
    )
    return finish(fig, caption, height=380)


def _add_screened(fig: go.Figure, score: float, estimate: float | None, low: float | None, high: float | None) -> None:
    if estimate is None or low is None or high is None:
        if np.isfinite(score):
            fig.add_vline(x=score, line={"color": VERMILLION, "dash": "dash"}, annotation_text="this set")
        return
    error = {"type": "data", "symmetric": False, "array": [high - estimate], "arrayminus": [estimate - low]}
    marker = {"color": VERMILLION, "size": 13, "symbol": "diamond"}
    fig.add_scatter(x=[score], y=[estimate], error_y=error, mode="markers", marker=marker, name="this set, predicted")
