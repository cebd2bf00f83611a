"""The page of a screened data set: prediction, histograms and a sortable table of the worst rows, self-contained."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from persona_probe.evaluate.shift import ShiftLine
from persona_probe.report.export import caption
from persona_probe.report.figures.screening import FittedLine, calibration, histogram
from persona_probe.report.page import asset, render
from persona_probe.report.theme import number
from persona_probe.runs import RunFolder
from persona_probe.screening.prediction import Shift
from persona_probe.screening.screening import Screening
from persona_probe.untrusted import csv_text
from persona_probe.writing import write_text

POINTS = 50
"""Places along the calibration's line."""


def screening_page(screening: Screening, name: str, model: str, worst: int = 50) -> str:
    """One HTML page that loads and sends nothing; all text of rows and models is escaped.

    Args:
        screening: the screened set.
        name: of the data set, for the heading.
        model: the base model's name.
        worst: how many rows of each ranker are listed.
    """
    rankers = [ranker.name for ranker in screening.rankers]
    rows = worst_rows(screening.frame, rankers, worst)
    context = {
        "name": name,
        "model": model,
        "feature": screening.feature.name,
        "layer": screening.feature.layer,
        "statement": screening.shift.statement,
        "notes": screening.notes,
        "count": len(screening.frame),
        "worst": min(worst, len(screening.frame)),
        "calibration": _calibration(screening.calibration, screening.shift),
        "histograms": _histograms(screening, worst),
        "rankers": rankers,
        "rows": [_row(row, rankers) for _, row in rows.iterrows()],
        "sorting": Markup(asset("tables.js")),
    }
    return render("screening.html.j2", context)


def worst_rows(frame: pd.DataFrame, rankers: list[str], worst: int) -> pd.DataFrame:
    """The `worst` rows of every ranker, in the frame's order."""
    places = {int(place) for name in rankers for place in frame[name].nlargest(worst).index}
    return frame.loc[sorted(places)]


def fitted_line(fit: ShiftLine, shift: Shift) -> FittedLine:
    """The calibration, and the screened set on it, for the calibration figure."""
    grid = np.linspace(fit.scores.min(), fit.scores.max(), POINTS)
    band = pd.DataFrame([fit.interval(float(x)) for x in grid], columns=["estimate", "low", "high"])
    sets = pd.DataFrame([vars(pair) for pair in fit.pairs])
    screened = (shift.score, shift.estimate, shift.low, shift.high)
    return FittedLine(sets, band.assign(score=grid), screened, fit.statement)


def _calibration(fit: ShiftLine | None, shift: Shift) -> dict[str, Any] | None:
    if fit is None:
        return None
    figure = calibration(fitted_line(fit, shift))
    return {"figure": figure, "caption": caption(figure)}


def _histograms(screening: Screening, worst: int) -> list[dict[str, Any]]:
    histograms = []
    for ranker in screening.rankers:
        figure = histogram(screening.frame[ranker.name].to_list(), ranker.label, worst)
        words = {"name": ranker.name, "label": ranker.label, "source": ranker.source}
        histograms.append({"figure": figure, "caption": caption(figure), **words})
    return histograms


def _row(row: pd.Series, rankers: list[str]) -> dict[str, Any]:
    values = [float(row[name]) for name in rankers]
    own_answer = row["own_answer"]
    return {
        "row": int(row["row"]),
        "question": row["question"],
        "answer": row["answer"],
        "own_answer": own_answer if isinstance(own_answer, str) else "–",
        "scores": [number(value) for value in values],
    }


# --- The files of a screening: screen.parquet, screen.csv, screen.json and screen.html

SHOWN = 5
"""Rows that the command prints."""


def write_screening(screening: Screening, out: Path, name: str, model: str, worst: int = 50) -> Path:
    """Write the scores of all rows (parquet and CSV), what they mean (JSON), and the page; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    RunFolder(out).write_table("screen.parquet", screening.frame)
    write_text(out / "screen.csv", csv_text(screening.frame))
    shift = {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in asdict(screening.shift).items()}
    about = {
        "data": name,
        "model": model,
        "feature": {
            "name": screening.feature.name,
            "layer": screening.feature.layer,
            "latent": screening.feature.latent,
        },
        "rankers": {r.name: {"label": r.label, "source": r.source} for r in screening.rankers},
        "shift": shift,
        "notes": list(screening.notes),
    }
    write_text(out / "screen.json", json.dumps(about, indent=2) + "\n")
    return write_text(out / "screen.html", screening_page(screening, name, model, worst))


def result_lines(screening: Screening) -> list[str]:
    """The lines that the command prints: the worst rows, the notes, the prediction."""
    first = screening.rankers[0]
    lines = [f"{len(screening.frame)} rows, worst first by {first.name}: {first.label}"]
    for _, row in screening.frame.head(SHOWN).iterrows():
        lines.append(f"  row {row['row']}: {row[first.name]:.3f}  {' '.join(str(row['answer']).split())[:90]}")
    return [*lines, *screening.notes, screening.shift.statement]
