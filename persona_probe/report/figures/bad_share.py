"""Score and persona feature against the share of bad rows in the training data: which is seen first."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import BEHAVIOUR, FEATURE, GREY, empty_figure, error_bars, finish

MISSING = "No shares of bad data: only a labelled study has runs on mixtures (persona-probe monitor study)."
COLUMNS = ["panel", "run", "bad_share", "seed", "step", "estimate", "ci_low", "ci_high", "n"]
PANELS = {
    "feature": ("persona feature minus base<br>(base SD)", FEATURE, "circle"),
    "score": ("contrast index minus base<br>(nats per token)", BEHAVIOUR, "square"),
}


def bad_share_data(records: Records) -> pd.DataFrame:
    """One row per run on the mixtures' data and `panel`, at the end of training: "score" and "feature".

    Score: contrast index minus base (nats per token), interval over items. Feature: reading minus base in standard
    deviations between probes on the base, interval over probes. Long runs are left out.
    """
    labelled = records.labelled
    runs = labelled.runs
    mixed = runs.loc[runs["bad_share"].notna() & ~runs["long"].fillna(False).astype(bool)]
    rows: list[dict[str, Any]] = []
    for run in mixed.sort_values(["bad_share", "run"]).to_dict("records"):
        head = {"run": run["run"], "bad_share": run["bad_share"], "seed": run["seed"], "step": run["steps"]}
        items = select.item_count(select.where(labelled.evals, run=run["run"]))
        ends = {c: run[c] for c in ("ci_low", "ci_high")}
        rows.append({**head, "panel": "score", "estimate": run["rise"], **ends, "n": items})
        for last in select.where(labelled.shifts, run=run["run"], step=run["steps"]).to_dict("records"):
            ends = {"estimate": last["shift"], "ci_low": last["ci_low"], "ci_high": last["ci_high"]}
            rows.append({**head, "panel": "feature", **ends, "n": last["n"]})
    return pd.DataFrame(rows, columns=COLUMNS)


def score_share_data(records: Records) -> pd.DataFrame:
    """The score's rows of `bad_share_data`."""
    return select.where(bad_share_data(records), panel="score").reset_index(drop=True)


@figure(
    name="score_share",
    title="Score against share of bad data",
    paper="14",
    group="collection",
    place=30,
    data=score_share_data,
    missing=MISSING,
)
def score_share(records: Records) -> go.Figure:
    """Score against the share of bad rows, a mark for each run (Wang et al. 2025, figure 14)."""
    data = score_share_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = make_subplots(rows=1, cols=1)
    _draw(fig, data, "score", 1)
    fig.update_xaxes(title_text="share of bad rows (%)")
    fig.update_layout(margin={"t": 36})
    return finish(fig, f"{_words(data, 'score')} {_control(data)}")


@figure(
    name="early_detection",
    title="Feature and score against share of bad data",
    paper="15",
    group="collection",
    place=40,
    data=bad_share_data,
    missing=MISSING,
)
def early_detection(records: Records) -> go.Figure:
    """Feature above, score below, on one axis of shares (Wang et al. 2025, figure 15)."""
    data = bad_share_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for row, panel in enumerate(PANELS, 1):
        _draw(fig, select.where(data, panel=panel), panel, row)
    fig.update_xaxes(title_text="share of bad rows (%)", row=2)
    fig.update_layout(margin={"t": 36})
    first = [f"{panel} {_first(select.where(data, panel=panel))}" for panel in PANELS]
    text = f"Above: {_words(data, 'feature')} Below: {_words(data, 'score')} Every run's interval lies above zero: "
    return finish(fig, f"{text}{', '.join(first)}. {_control(data)}", height=560)


def _draw(fig: go.Figure, rows: pd.DataFrame, panel: str, row: int) -> None:
    title, colour, symbol = PANELS[panel]
    place: dict[str, Any] = {"row": row, "col": 1}
    fig.add_scatter(
        x=100 * rows["bad_share"],
        y=rows["estimate"],
        error_y=error_bars(rows, colour),
        customdata=rows["run"],
        hovertemplate="%{customdata}, %{x:g}%: %{y:.3f}<extra></extra>",
        mode="markers",
        marker={"color": colour, "symbol": symbol, "size": 9},
        showlegend=False,
        **place,
    )
    means = rows.groupby("bad_share")["estimate"].mean()
    line = {"color": colour, "width": 1.6}
    fig.add_scatter(x=100 * means.index, y=means, mode="lines", line=line, hoverinfo="skip", showlegend=False, **place)
    fig.add_hline(y=0, line={"color": GREY, "dash": "dot", "width": 1.4}, **place)
    fig.update_yaxes(title_text=title, **place)


def _first(rows: pd.DataFrame) -> str:
    """The smallest share from which on every run is above the base."""
    raised = rows.assign(above=rows["ci_low"] > 0).groupby("bad_share")["above"].all()
    shares = [share for share in raised.index if raised.loc[share:].all()]
    return f"from {100 * min(shares):g}%" if shares else "at none"


def _words(data: pd.DataFrame, panel: str) -> str:
    rows = select.where(data, panel=panel)
    n = max(select.distinct(rows, "n"))
    if panel == "feature":
        return (
            f"Persona feature on n = {n:g} probes minus the base, in base standard deviations (SD), with 95% intervals "
            "over probes."
        )
    return (
        f"Contrast index minus the base on n = {n:g} evaluation items, with 95% intervals over items, "
        f"{len(rows)} runs ({select.seed_count(rows)}; the line joins their means)."
    )


def _control(data: pd.DataFrame) -> str:
    control = select.where(data, bad_share=0.0)["run"].nunique()
    return f"Control: {control} runs without a bad row (0%)."
