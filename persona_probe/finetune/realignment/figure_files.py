"""The dose-response figure of a grid as files beside its table."""

from pathlib import Path

import pandas as pd

from persona_probe.report.figures.doses import doses, doses_data
from persona_probe.report.page import render, write_text

TITLE = "How many corrective rows are enough"


def write_figure(run: Path, table: pd.DataFrame) -> Path:
    """Write `realign/doses.html` and `realign/doses.csv` below a run folder; returns the page's path."""
    fig = doses(table)
    write_text(run / "realign" / "doses.csv", doses_data(table).to_csv(index=False))
    caption = str(fig.layout.meta["caption"])  # pyright: ignore[reportAttributeAccessIssue]
    context = {"title": TITLE, "name": "doses", "figure": fig, "caption": caption}
    return write_text(run / "realign" / "doses.html", render("figure.html.j2", context))
