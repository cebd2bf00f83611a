"""Write figures as files: a self-contained page, the numbers, and images for print."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from persona_probe.errors import unknown
from persona_probe.report.figures import ALL_FIGURES, FigureSpec, figures_of
from persona_probe.report.page import render, write_text
from persona_probe.report.printing import Width, check_theme
from persona_probe.report.provenance import provenance, provenance_line
from persona_probe.report.records import Records
from persona_probe.report.static import STATIC, find_browser, write_images
from persona_probe.report.theme import TEMPLATES, Theme

FORMATS = ("html", "csv", "svg")
"""What is written unless something else is asked for."""
ALL_FORMATS = ("html", "csv", *STATIC)
SVG_WIDTH = 960
"""Pixels of an image that is drawn as on the screen."""
DIGITS = 10
"""Of the numbers in a CSV: more differ between processors, which add in another order."""

__all__ = ["ALL_FORMATS", "FORMATS", "caption", "csv_text", "export_figures", "find_browser"]


def export_figures(
    records: Records,
    folder: str | Path,
    only: Sequence[str] | None = None,
    formats: Sequence[str] = FORMATS,
    *,
    width: Width = "page",
    theme: Theme = "light",
) -> list[Path]:
    """Write figures into `folder` (made if need be), each file whole or not at all.

    Args:
        folder: where `<name>.<format>` goes; older files are replaced.
        only: names from `ALL_FIGURES`; None writes all that the records show.
        formats: some of html, csv, svg, pdf, png. The CSV is written always. Images need kaleido and a Chromium;
            without them they are skipped with one logged line.
        width: of images in print: "column" (89 mm) or "page" (183 mm).
        theme: "light" or "dark".

    Returns:
        The files written.

    Raises:
        InputError: an unknown figure, format, width or theme, or a browser that could not draw.
    """
    specs = list(figures_of(records).values()) if only is None else [_spec(name) for name in only]
    for wanted in formats:
        if wanted not in ALL_FORMATS:
            raise unknown("figure format", wanted, ALL_FORMATS)
    check_theme(theme)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = [write_text(target / f"{s.name}.csv", csv_text(s.data(records))) for s in specs]
    drawn = [(s, s.draw(records)) for s in specs] if set(formats) - {"csv"} else []
    if "html" in formats:
        written += [_write_page(target, spec, fig, records, theme) for spec, fig in drawn]
    if images := [kind for kind in STATIC if kind in formats]:
        written += write_images(target, drawn, images, records.manifest, width, theme)
    return written


def csv_text(data: pd.DataFrame) -> str:
    """A figure's numbers as CSV, the same on every machine: ten decimals and significant digits, LF line ends."""
    floats = data.select_dtypes("float").columns
    # adding zero turns -0 into 0
    rounded = data.assign(**{name: data[name].round(DIGITS) + 0.0 for name in floats})
    return rounded.to_csv(index=False, float_format=f"%.{DIGITS}g", lineterminator="\n")


def _spec(name: str) -> FigureSpec:
    if name not in ALL_FIGURES:
        raise unknown("figure", name, ALL_FIGURES)
    return ALL_FIGURES[name]


def _write_page(folder: Path, spec: FigureSpec, fig: go.Figure, records: Records, theme: Theme) -> Path:
    context: dict[str, Any] = {
        "title": spec.title,
        "name": spec.name,
        "figure": go.Figure(fig).update_layout(template=TEMPLATES[theme]),
        "caption": caption(fig),
        "provenance": provenance(records.manifest),
        "footer": provenance_line(records.manifest),
        "theme": theme,
    }
    return write_text(folder / f"{spec.name}.html", render("figure.html.j2", context))


def caption(fig: go.Figure) -> str:
    """The caption that a figure carries."""
    return str(fig.layout.meta["caption"])  # pyright: ignore[reportAttributeAccessIssue]
