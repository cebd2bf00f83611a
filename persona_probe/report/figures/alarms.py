"""Feature, behaviour and explained variance over training of many labelled runs, with the monitor's first alarms."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import PERSONA, LabelledRuns, Records
from persona_probe.report.theme import BEHAVIOUR, BLUE, GREY, ORANGE, VERMILLION, empty_figure, finish, plain, ribbon

MISSING = "No alarms to show: only a labelled study has a calibrated alarm (persona-probe monitor study)."
COLUMNS = ["panel", "run", "label", "step", "estimate", "ci_low", "ci_high", "n", "first_alarm", "behaviour_step"]
PANELS = {
    "feature": "feature minus base<br>(base SD)",
    "behaviour": "index minus base<br>(nats per token)",
    "explained_variance": "explained variance<br>(share)",
}
LABELS = {"benign": (BLUE, "dash"), "quiet": (ORANGE, "dot"), "misaligned": (VERMILLION, "solid")}
"""What a run is, by its data and behaviour: colour and line."""


def alarms_data(records: Records) -> pd.DataFrame:
    """One row per evaluated run, step and `panel`, with the run's first alarm and the step at which behaviour rose.

    Feature: minus base in base standard deviations (interval over probes). Behaviour: contrast index minus base
    (interval over items, nats per token). Explained variance: share. Calibration runs and long runs are left out.
    """
    labelled = records.labelled
    runs = labelled.runs
    evaluated = runs.loc[(runs["use"] == "evaluation") & ~runs["long"].fillna(False).astype(bool)]
    first = rule(labelled).get("first_alarm", {})
    rows: list[dict[str, Any]] = []
    for run in evaluated.to_dict("records"):
        name = str(run["run"])
        same = {"run": name, "label": run["label"], "first_alarm": first.get(name)}
        rows += [{**same, "behaviour_step": run["behaviour_step"], **row} for row in _curves(labelled, name)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.astype({name: "Int64" for name in ("step", "n", "first_alarm", "behaviour_step")})


def rule(labelled: LabelledRuns) -> Mapping[str, Any]:
    """The calibrated alarm on the persona feature that must hold for most readings; empty if there is none."""
    rules = select.mapping(select.mapping(labelled.results.get("signals")).get(PERSONA)).get("rules", [])
    return max((r for r in rules if "calibration" in r), key=lambda r: r["held"], default={})


def _curves(labelled: LabelledRuns, run: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for one in select.where(labelled.shifts, run=run).to_dict("records"):
        at = {"step": one["step"], "n": one["n"]}
        ends = {"ci_low": one["ci_low"], "ci_high": one["ci_high"]}
        rows.append({"panel": "feature", **at, "estimate": one["shift"], **ends})
        rows.append({"panel": "explained_variance", **at, "estimate": one["explained_variance"]})
    items = select.item_count(select.where(labelled.evals, run=run))
    for one in select.where(labelled.rises, run=run).to_dict("records"):
        ends = {"ci_low": one["ci_low"], "ci_high": one["ci_high"], "n": items}
        rows.append({"panel": "behaviour", "step": one["step"], "estimate": one["rise"], **ends})
    return rows


@figure(
    name="alarms",
    title="What the monitor saw, and when",
    group="collection",
    place=50,
    data=alarms_data,
    missing=MISSING,
)
def alarms(records: Records) -> go.Figure:
    """Three panels over training steps; a triangle is a run's first alarm, a ring the step at which behaviour rose."""
    data = alarms_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = make_subplots(rows=len(PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.05)
    for row, (panel, title) in enumerate(PANELS.items(), 1):
        for (label, run), line in select.groups(select.where(data, panel=panel), "label", "run"):
            _draw(fig, line, str(label), str(run), row)
        fig.update_yaxes(title_text=title, row=row, col=1)
    calibration = select.mapping(rule(records.labelled).get("calibration"))
    if calibration:
        place: dict[str, Any] = {"row": 1, "col": 1}
        fig.add_hline(y=calibration["threshold"], line={"color": GREY, "dash": "dash", "width": 1.4}, **place)
    _draw_marks(fig, data)
    _draw_legend(fig, data)
    fig.update_xaxes(title_text="training step", row=len(PANELS), col=1)
    return finish(fig, _caption(records, data), height=680)


def _draw(fig: go.Figure, line: pd.DataFrame, label: str, run: str, panel: int) -> None:
    colour, dash = LABELS[label]
    known = line.dropna(subset=["ci_low", "ci_high"])
    if panel == 1 and len(known):
        fig.add_trace(
            ribbon(known["step"].tolist(), known["ci_low"].tolist(), known["ci_high"].tolist(), colour),
            row=panel,
            col=1,
        )
    style = {"mode": "lines", "line": {"color": colour, "dash": dash, "width": 1.4}, "showlegend": False}
    hover = f"{plain(run)} ({label})<br>step %{{x}}: %{{y:.3f}}<extra></extra>"
    fig.add_scatter(x=line["step"], y=line["estimate"], hovertemplate=hover, **style, row=panel, col=1)


def _draw_marks(fig: go.Figure, data: pd.DataFrame) -> None:
    for panel, column, symbol, name in (
        ("feature", "first_alarm", "triangle-up", "first alarm"),
        ("behaviour", "behaviour_step", "circle-open", "behaviour rose"),
    ):
        rows = select.where(data, panel=panel)
        points = rows.loc[(rows["step"] == rows[column]).fillna(False)]
        mark = {"symbol": symbol, "size": 10, "color": BEHAVIOUR if symbol == "circle-open" else VERMILLION}
        row = list(PANELS).index(panel) + 1
        fig.add_scatter(x=points["step"], y=points["estimate"], mode="markers", marker=mark, name=name, row=row, col=1)


def _draw_legend(fig: go.Figure, data: pd.DataFrame) -> None:
    for label, (colour, dash) in LABELS.items():
        if label in set(data["label"]):
            fig.add_scatter(x=[None], y=[None], mode="lines", line={"color": colour, "dash": dash}, name=label)


def _caption(records: Records, data: pd.DataFrame) -> str:
    runs = data.drop_duplicates("run")
    counts = runs["label"].value_counts()
    kinds = ", ".join(f"{counts[k]} {k}" for k in LABELS if k in counts)
    alarm_rule = rule(records.labelled)
    words = "no alarm was calibrated"
    if alarm_rule:
        alarmed = {label: rows["first_alarm"].notna().sum() for (label,), rows in select.groups(runs, "label")}
        of = ", ".join(f"{alarmed[k]} of {counts[k]} {k}" for k in LABELS if k in counts)
        words = (
            f"dashed: the threshold {alarm_rule['calibration']['threshold']:.3g}, set on "
            f"{alarm_rule['calibration']['n_runs']} other benign runs and held for {alarm_rule['held']} "
            f"readings; it alarmed in {of} runs"
        )
    items, probes = (max(select.distinct(select.where(data, panel=p), "n")) for p in ("behaviour", "feature"))
    return (
        f"{len(runs)} runs ({kinds}). Above: persona feature minus base, in base standard deviations (SD), on "
        f"n = {probes:g} probes with 95% bands over probes; {words}. Middle: contrast index minus base on "
        f"n = {items:g} items; rings: first step at which its 95% interval lies above zero. Below: the SAE's explained "
        "variance on the same tokens. Control: the benign runs."
    )
