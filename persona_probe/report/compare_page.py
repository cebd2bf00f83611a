"""The page of `persona-probe compare`: two runs' verdicts, numbers and figures beside each other."""

from pathlib import Path
from typing import Any

from persona_probe.report.compare import compared_numbers, config_differences, distinct_folders, limits
from persona_probe.report.headline import headline, tiles
from persona_probe.report.html import drawn_figures
from persona_probe.report.page import render, write_text
from persona_probe.report.provenance import provenance_line
from persona_probe.report.records import Records, load_records


def write_comparison(left: str | Path, right: str | Path, out: str | Path) -> Path:
    """Write one page that shows two runs side by side; A is `left`, differences are B minus A.

    Figures that both runs have share their axes' ranges, so that heights can be compared.

    Returns:
        The page's path. It is self-contained: it loads nothing and sends nothing.

    Raises:
        InputError: not two different run folders, or a damaged file in one.
    """
    a, b = distinct_folders(left, right)
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    pair = load_records(a), load_records(b)
    return write_text(target, render("compare.html.j2", comparison(pair, (a.name, b.name))))


def comparison(pair: tuple[Records, Records], folders: tuple[str, str]) -> dict[str, Any]:
    """What the comparison's template shows."""
    return {
        "runs": [_run(records, letter, folder) for records, letter, folder in zip(pair, "AB", folders, strict=True)],
        "numbers": compared_numbers(pair),
        "limits": limits(pair),
        "differences": config_differences(pair),
        "figures": _paired_figures(pair),
    }


def _run(records: Records, letter: str, folder: str) -> dict[str, Any]:
    return {
        "letter": letter,
        "folder": folder,
        "study": str(records.summary.get("study") or "study"),
        "base_model": str(records.summary.get("base_model") or "unknown model"),
        "headline": headline(records),
        "tiles": tiles(records),
        "provenance": provenance_line(records.manifest),
    }


def _paired_figures(pair: tuple[Records, Records]) -> list[dict[str, Any]]:
    """Figures that at least one run can draw, each with both sides."""
    drawn = [drawn_figures(records) for records in pair]
    rows = []
    for name in dict.fromkeys([*drawn[0], *drawn[1]]):
        sides = [figures.get(name) for figures in drawn]
        known = next(side for side in sides if side is not None)
        if any(side is not None and side["figure"] is not None for side in sides):
            blank = {**known, "figure": None}
            rows.append({"name": name, "title": known["title"], "sides": [side or blank for side in sides]})
    return rows
