"""Figures for paper: one column or a whole page wide, legible at that size, with their origin as a footer."""

from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go

from persona_probe.errors import unknown
from persona_probe.report.theme import TEMPLATES, THEMES, Theme

PIXELS_PER_MM = 96 / 25.4
"""Of CSS, in which SVG and PDF are measured."""
POINT = 96 / 72
"""Pixels."""
SMALLEST_PT = 6.0
"""No text is smaller in print."""
PNG_SCALE = 4
"""384 dots per inch."""

Width = Literal["column", "page"]


@dataclass(frozen=True)
class PrintSize:
    """A width in print and what fits it."""

    mm: float
    font_pt: float
    shrink: float
    """Marks, lines and heights relative to the screen's."""

    @property
    def pixels(self) -> int:
        """Width in CSS pixels."""
        return round(self.mm * PIXELS_PER_MM)

    @property
    def font(self) -> float:
        """Size of all text but the footer, in pixels."""
        return self.font_pt * POINT


WIDTHS: dict[Width, PrintSize] = {"column": PrintSize(89, 6.5, 0.62), "page": PrintSize(183, 8, 0.8)}
"""One column and the whole width of a journal's page."""
FOOTER_PX = SMALLEST_PT * POINT
LINE_HEIGHT = 1.35
"""Of text, in font sizes."""


def for_print(fig: go.Figure, width: Width = "page", theme: Theme = "light", footer: str = "") -> go.Figure:
    """A copy of a figure for print.

    Args:
        width: "column" (89 mm) or "page" (183 mm); all text is at least 6 points there.
        theme: "light" or "dark".
        footer: a line at the bottom, such as `provenance.short_provenance` gives.

    Raises:
        InputError: an unknown width or theme.
    """
    if width not in WIDTHS:
        raise unknown("figure width", width, WIDTHS)
    check_theme(theme)
    size = WIDTHS[width]
    drawn: Any = go.Figure(fig)
    template: Any = TEMPLATES[theme]
    top = drawn.layout.margin.t or template.layout.margin.t
    drawn.update_layout(
        template=template,
        font_size=size.font,
        width=size.pixels,
        height=round((drawn.layout.height or 420) * size.shrink) + round(2 * FOOTER_PX),
        margin={"t": max(14, top * size.shrink), "l": 40, "r": 8},
        title={"text": footer, "font": {"size": FOOTER_PX}, **_AT_BOTTOM},
    )
    drawn.for_each_xaxis(lambda axis: _break_labels(axis, narrow=width == "column"))
    drawn.update_layout(margin_b=_room_below(drawn, size))
    drawn.update_annotations(font_size=size.font)
    for trace in drawn.data:
        _shrink(trace, size)
    return drawn


_AT_BOTTOM: dict[str, Any] = {
    "xref": "container",
    "x": 0.01,
    "xanchor": "left",
    "yref": "container",
    "y": 0.0,
    "yanchor": "bottom",
}
_AT_BOTTOM["pad"] = {"b": 3}
"""The only text that plotly places from the edge of the image."""


def check_theme(theme: str) -> None:
    """Raise an `InputError` for a theme that there is not."""
    if theme not in THEMES:
        raise unknown("figure theme", theme, THEMES)


def _room_below(drawn: Any, size: PrintSize) -> float:
    """Pixels for tick labels, axis titles and the footer: plotly's own margin leaves no room for the footer."""
    axes = [axis for axis in drawn.select_xaxes() if axis.visible is not False]
    if not axes:
        return 3 * FOOTER_PX
    ticks = max(_lines(label) for axis in axes for label in (axis.ticktext or ("",)))
    titles = max(_lines(axis.title.text or "") for axis in axes)
    slanted = max((len(str(x)) for t in drawn.data if t.type == "heatmap" for x in t.x), default=0)
    return (ticks + titles) * LINE_HEIGHT * size.font + 0.3 * slanted * size.font + 12 + 2.5 * FOOTER_PX


def _lines(text: str) -> int:
    return text.count("<br>") + 1


def _break_labels(axis: Any, narrow: bool) -> None:
    """Labels stay level: plotly would turn them, or leave some out."""
    if axis.ticktext:
        labels = [label.replace(" ", "<br>") for label in axis.ticktext] if narrow else axis.ticktext
        axis.update(ticktext=labels, tickangle=0)


def _shrink(trace: Any, size: PrintSize) -> None:
    if trace.type == "heatmap":
        trace.update(colorbar={"thickness": 12, "title": {"font": {"size": size.font}}})
        return
    if isinstance(trace.marker.size, (int, float)):
        trace.update(marker={"size": max(3.0, trace.marker.size * size.shrink)})
    if isinstance(trace.line.width, (int, float)) and trace.line.width > 1:
        trace.update(line={"width": max(0.8, trace.line.width * size.shrink)})
    if "text" in (trace.mode or ""):
        trace.update(textfont={"size": size.font})
