"""The report of a run folder: one HTML file that works offline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona_probe.report.answers import answer_choices, sampled_answers
from persona_probe.report.export import caption
from persona_probe.report.figures import FIGURES, figures_of
from persona_probe.report.headline import headline, key_numbers, tiles
from persona_probe.report.judged import judged_answers
from persona_probe.report.page import render, write_text
from persona_probe.report.provenance import provenance, provenance_line
from persona_probe.report.records import Records, load_records
from persona_probe.report.sections import cards, realignment, tested_latents, trajectory_notes

JUDGED = ("rates", "coherence", "judge_agreement")
PLACED = ("arms", "trajectory", "dose_response", "realignment", "latents", "categories", "controls", *JUDGED)
"""Figures that have their own place in the report; others follow under More figures."""


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run folder from its records; stages that have not run are said in one line each.

    Returns:
        The report's path. It is self-contained: it loads nothing and sends nothing. It links to `cards.html` and to
        the figures' CSV files where the folder has them.

    Raises:
        InputError: not a run folder, or a damaged file in it.
    """
    root = Path(folder)
    return write_text(root / "report.html", render("report.html.j2", context(load_records(root), links(root))))


def links(root: Path) -> dict[str, str]:
    """Files of a run folder that its report links to: `cards` and, by name, the figures' numbers."""
    found = {p.stem: f"figures/{p.name}" for p in sorted((root / "figures").glob("*.csv"))}
    return found | ({"cards": "cards.html"} if (root / "cards.html").is_file() else {})


def context(records: Records, linked: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the report's template shows."""
    answers, figures = sampled_answers(records), drawn_figures(records)
    return {
        "study": str(records.summary.get("study") or "study"),
        "base_model": str(records.summary.get("base_model") or "unknown model"),
        "headline": headline(records),
        "tiles": tiles(records),
        "numbers": key_numbers(records),
        "figures": figures,
        "more": [name for name in figures if name not in PLACED],
        "trajectory": trajectory_notes(records),
        "realignment": realignment(records),
        "tested": tested_latents(records),
        "cards": cards(records),
        "samples": answers,
        "choices": answer_choices(answers),
        "judged": judged_answers(records),
        "judged_figures": [name for name in JUDGED if name in figures],
        "manifest": records.manifest,
        "provenance": provenance(records.manifest),
        "provenance_line": provenance_line(records.manifest),
        "links": dict(linked or {}),
    }


def drawn_figures(records: Records) -> dict[str, dict[str, Any]]:
    """Every figure that the study shows: title, and the drawing with its caption or what is missing for it."""
    shown: dict[str, dict[str, Any]] = {}
    for name, spec in (FIGURES | figures_of(records)).items():
        drawn = None if spec.data(records).empty else spec.draw(records)
        words = {"title": spec.title, "missing": spec.missing, "caption": caption(drawn) if drawn else ""}
        shown[name] = {"name": name, "figure": drawn, **words}
    return shown
