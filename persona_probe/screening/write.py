"""What a screening leaves behind: screen.parquet, screen.csv, screen.json, screen.html, and the own answers."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from persona_probe.report.page import write_text
from persona_probe.runs import RunFolder, write_atomic
from persona_probe.screening.page import screening_page
from persona_probe.screening.screen import Screening
from persona_probe.screening.settings import Settings

SHOWN = 5


def settings_for(out: Path, mixed_precision: bool = True) -> Settings:
    """Settings of a screening into a folder (made if need be): own answers are kept there."""
    out.mkdir(parents=True, exist_ok=True)
    return Settings(own_path=out / "own_answers.jsonl", mixed_precision=mixed_precision, progress=True)


def write_screening(found: Screening, out: Path, name: str, model: str, worst: int = 50) -> Path:
    """Write scores of all rows (parquet and CSV), what they mean (JSON), and the page; returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    RunFolder(out).write_table("screen.parquet", found.frame)
    write_atomic(out / "screen.csv", found.frame.to_csv(index=False))
    shift = {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in asdict(found.shift).items()}
    about = {
        "data": name,
        "model": model,
        "feature": {"name": found.feature.name, "layer": found.feature.layer, "latent": found.feature.latent},
        "rankers": {r.name: {"label": r.label, "source": r.source} for r in found.rankers},
        "shift": shift,
        "notes": list(found.notes),
    }
    write_atomic(out / "screen.json", json.dumps(about, indent=2) + "\n")
    return write_text(out / "screen.html", screening_page(found, name, model, worst))


def result_lines(found: Screening) -> list[str]:
    """What the command prints: the worst rows, the notes, the prediction."""
    first = found.rankers[0]
    lines = [f"{len(found.frame)} rows, worst first by {first.name}: {first.label}"]
    for _, row in found.frame.head(SHOWN).iterrows():
        lines.append(f"  row {row['row']}: {row[first.name]:.3f}  {' '.join(str(row['answer']).split())[:90]}")
    return [*lines, *found.notes, found.shift.statement]
