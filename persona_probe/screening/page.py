"""The page of a screened data set: prediction, histograms and a sortable table of the worst rows, self-contained."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from persona_probe.evaluate.shift import Calibration
from persona_probe.report.export import caption
from persona_probe.report.figures.screening import FittedLine, calibration, histogram
from persona_probe.report.page import asset, render
from persona_probe.report.theme import number
from persona_probe.runs import RunFolder, write_text
from persona_probe.screening.prediction import Shift
from persona_probe.screening.screening import Screening

POINTS = 50
"""Places along the calibration's line."""


def screening_page(found: Screening, name: str, model: str, worst: int = 50) -> str:
    """One HTML page that loads and sends nothing; all text of rows and models is escaped.

    Args:
        found: the screened set.
        name: of the data set, for the heading.
        model: the base model's name.
        worst: how many rows of each ranker are listed.
    """
    rankers = [ranker.name for ranker in found.rankers]
    listed = worst_rows(found.frame, rankers, worst)
    context = {
        "name": name,
        "model": model,
        "feature": found.feature.name,
        "layer": found.feature.layer,
        "statement": found.shift.statement,
        "notes": found.notes,
        "count": len(found.frame),
        "worst": min(worst, len(found.frame)),
        "calibration": _calibration(found.calibration, found.shift),
        "histograms": _histograms(found, worst),
        "rankers": rankers,
        "rows": [_row(row, rankers) for _, row in listed.iterrows()],
        "sorting": Markup(asset("tables.js")),
    }
    return render("screening.html.j2", context)


def worst_rows(frame: pd.DataFrame, rankers: list[str], worst: int) -> pd.DataFrame:
    """The `worst` rows of every ranker, in the frame's order."""
    chosen = {int(place) for name in rankers for place in frame[name].nlargest(worst).index}
    return frame.loc[sorted(chosen)]


def fitted_line(found: Calibration, shift: Shift) -> FittedLine:
    """What the calibration figure draws."""
    grid = np.linspace(found.scores.min(), found.scores.max(), POINTS)
    band = pd.DataFrame([found.interval(float(x)) for x in grid], columns=["estimate", "low", "high"])
    sets = pd.DataFrame([vars(pair) for pair in found.pairs])
    screened = (shift.score, shift.estimate, shift.low, shift.high)
    return FittedLine(sets, band.assign(score=grid), screened, found.statement)


def _calibration(found: Calibration | None, shift: Shift) -> dict[str, Any] | None:
    if found is None:
        return None
    drawn = calibration(fitted_line(found, shift))
    return {"figure": drawn, "caption": caption(drawn)}


def _histograms(found: Screening, worst: int) -> list[dict[str, Any]]:
    shown = []
    for ranker in found.rankers:
        drawn = histogram(found.frame[ranker.name].to_list(), ranker.label, worst)
        words = {"name": ranker.name, "label": ranker.label, "source": ranker.source}
        shown.append({"figure": drawn, "caption": caption(drawn), **words})
    return shown


def _row(row: pd.Series, rankers: list[str]) -> dict[str, Any]:
    values = [float(row[name]) for name in rankers]
    own = row["own_answer"]
    return {
        "row": int(row["row"]),
        "question": row["question"],
        "answer": row["answer"],
        "own_answer": own if isinstance(own, str) else "–",
        "scores": [number(value) for value in values],
    }


# --- What a screening leaves behind: screen.parquet, screen.csv, screen.json, screen.html, and the own answers

SHOWN = 5


def write_screening(found: Screening, out: Path, name: str, model: str, worst: int = 50) -> Path:
    """Write scores of all rows (parquet and CSV), what they mean (JSON), and the page; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    RunFolder(out).write_table("screen.parquet", found.frame)
    write_text(out / "screen.csv", found.frame.to_csv(index=False))
    shift = {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in asdict(found.shift).items()}
    about = {
        "data": name,
        "model": model,
        "feature": {"name": found.feature.name, "layer": found.feature.layer, "latent": found.feature.latent},
        "rankers": {r.name: {"label": r.label, "source": r.source} for r in found.rankers},
        "shift": shift,
        "notes": list(found.notes),
    }
    write_text(out / "screen.json", json.dumps(about, indent=2) + "\n")
    return write_text(out / "screen.html", screening_page(found, name, model, worst))


def result_lines(found: Screening) -> list[str]:
    """What the command prints: the worst rows, the notes, the prediction."""
    first = found.rankers[0]
    lines = [f"{len(found.frame)} rows, worst first by {first.name}: {first.label}"]
    for _, row in found.frame.head(SHOWN).iterrows():
        lines.append(f"  row {row['row']}: {row[first.name]:.3f}  {' '.join(str(row['answer']).split())[:90]}")
    return [*lines, *found.notes, found.shift.statement]
