"""Predicting the effect of training from a data set's score: data sets, the fitted line, and each set left out."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from persona_probe.evaluate.shift import LEAST, ScoredRun, ShiftLine, calibrate
from persona_probe.report.figures.registry import figure
from persona_probe.report.figures.screening import FittedLine, calibration
from persona_probe.report.records import Records
from persona_probe.report.theme import BLACK, empty_figure, finish, plain

MISSING = "No calibration: fewer than five data sets were trained on and scored (`screening.parquet`)."
COLUMNS = ["kind", "data", "seed", "score", "shift", "low", "high"]
POINTS = 41
"""Places along the line."""


def screening_calibration_data(records: Records) -> pd.DataFrame:
    """Runs (`shift` measured), sets left out (`shift` predicted from the others), and the line with its interval."""
    fitted = _fitted(records)
    if fitted is None:
        return pd.DataFrame(columns=COLUMNS)
    grid = np.linspace(fitted.scores.min(), fitted.scores.max(), POINTS)
    line = pd.DataFrame([fitted.interval(float(x)) for x in grid], columns=["shift", "low", "high"])
    left = pd.DataFrame({"data": list(fitted.sets), "score": fitted.scores, "shift": fitted.shifts_from_others})
    parts = [records.screening.assign(kind="run"), left.assign(kind="left out"), line.assign(kind="line", score=grid)]
    return pd.concat(parts, ignore_index=True).reindex(columns=COLUMNS)


@figure(
    name="screening_calibration",
    title="Predicting the effect of training from a data set's score",
    group="collection",
    place=80,
    data=screening_calibration_data,
    missing=MISSING,
)
def screening_calibration(records: Records) -> go.Figure:
    """Training runs as dots, predictions of left-out sets as crosses, the line with its prediction interval."""
    fitted, data = _fitted(records), screening_calibration_data(records)
    if fitted is None:
        return empty_figure(MISSING)
    runs, left, line = (data[data["kind"] == kind] for kind in ("run", "left out", "line"))
    band = line.rename(columns={"shift": "estimate"})
    fig = calibration(FittedLine(runs, band, (float("nan"), None, None, None), ""))
    fig.add_scatter(
        x=left["score"],
        y=left["shift"],
        mode="markers",
        marker={"symbol": "x-thin", "size": 10, "line": {"width": 2, "color": BLACK}},
        text=[plain(name) for name in left["data"]],
        hovertemplate="%{text}, from the others: %{y:.2f}<extra></extra>",
        name="set, predicted from the others",
    )
    return finish(fig, _caption(fitted), height=420)


def _fitted(records: Records) -> ShiftLine | None:
    table = records.screening
    if table["data"].nunique() < LEAST:
        return None
    rows = table.to_dict("records")
    return calibrate([ScoredRun(str(r["data"]), int(r["seed"]), float(r["score"]), float(r["shift"])) for r in rows])


def _caption(fitted: ShiftLine) -> str:
    errors = [
        predicted - shift for predicted, (_, shift) in zip(fitted.shifts_from_others, fitted.sets.values(), strict=True)
    ]
    worst = int(np.abs(errors).argmax())
    return (
        f"n = {len(fitted.pairs)} training runs on {len(fitted.sets)} data sets: mean score of a set's rows, and what "
        "training on it did to the contrast index. The line is fitted to data sets, each the mean of its runs; shaded: "
        "95% prediction interval for one more. Crosses: each set predicted from the others, off by "
        f"{fitted.left_out:.2f} nats per token (root mean square; control: the others' mean is off by "
        f"{fitted.baseline:.2f}), most for {plain(list(fitted.sets)[worst])} ({errors[worst]:+.2f})."
    )
