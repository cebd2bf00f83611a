"""The stress-test panel as files beside the table."""

from pathlib import Path

import pandas as pd


def write_figure(folder: Path, table: pd.DataFrame) -> Path:
    """Write `stress.html` and `stress.csv` into a folder; returns the page's path."""
    from persona_probe.report.figures.stress import stress, stress_data
    from persona_probe.report.page import render, write_text

    fig = stress(table)
    write_text(folder / "stress.csv", stress_data(table).to_csv(index=False))
    caption = str(fig.layout.meta["caption"])  # pyright: ignore[reportAttributeAccessIssue]
    context = {"title": "Stress tests of a repair", "name": "stress", "figure": fig, "caption": caption}
    return write_text(folder / "stress.html", render("figure.html.j2", context))
