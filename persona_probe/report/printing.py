"""Figures for paper and slides: presets of journals and conferences, fonts that travel with the file, a footer."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal

import plotly.graph_objects as go

from persona_probe.errors import unknown
from persona_probe.report.theme import BLACK, DARK_INK, TEMPLATES, Theme, check_theme

PIXELS_PER_MM = 96 / 25.4
"""Of CSS, in which SVG and PDF are measured."""
POINT = 96 / 72
"""Pixels."""
SMALLEST_PT = 6.0
"""No text is smaller in print."""
PNG_SCALE = 4
"""384 dots per inch."""

Width = Literal["column", "page", "icml", "icml-wide", "neurips", "nature", "nature-wide", "slides"]


@dataclass(frozen=True)
class Font:
    """A font that matplotlib ships, so that it is the same on every machine."""

    family: str
    """As a style sheet names it, with what stands in for it where a program ignores embedded fonts."""
    file: str
    """In matplotlib's folder of fonts."""

    @property
    def name(self) -> str:
        """The family's own name."""
        return self.family.partition(",")[0].strip("'\"")

    def path(self) -> Path:
        """The file, from matplotlib, which the extra `figures` brings."""
        import matplotlib

        return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / self.file


SANS = Font("'DejaVu Sans', Verdana, sans-serif", "DejaVuSans.ttf")
SERIF = Font("STIXGeneral, 'STIX Two Text', 'Times New Roman', Times, serif", "STIXGeneral.ttf")
"""The letters of Times, which ICML and NeurIPS set their papers in."""


@dataclass(frozen=True)
class PrintSize:
    """A width in print and what fits it."""

    mm: float
    font_pt: float
    shrink: float
    """Marks, lines and heights relative to the screen's."""
    font_face: Font = SANS
    most_mm: float = 247.0
    """No figure is higher."""

    @property
    def pixels(self) -> int:
        """Width in CSS pixels."""
        return round(self.mm * PIXELS_PER_MM)

    @property
    def font(self) -> float:
        """Size of all text but the footer, in pixels."""
        return self.font_pt * POINT


WIDTHS: dict[Width, PrintSize] = {
    "column": PrintSize(89, 6.5, 0.62),
    "page": PrintSize(183, 8, 0.8),
    "icml": PrintSize(82.55, 7.5, 0.62, SERIF, 230),
    "icml-wide": PrintSize(171.45, 9, 0.8, SERIF, 230),
    "neurips": PrintSize(139.7, 9, 0.75, SERIF, 225),
    "nature": PrintSize(89, 6.5, 0.62, SANS, 170),
    "nature-wide": PrintSize(183, 7, 0.8, SANS, 170),
    "slides": PrintSize(254, 14, 1.2, SANS, 143),
}
"""One column and the whole width of a journal's page; then the text widths that the style files of ICML (3.25 and 6.75
inches) and NeurIPS (5.5 inches) set, Nature's 89 and 183 mm with text of 5 to 7 points, a slide of 10 by 5.6 inches."""
FOOTER_PX = SMALLEST_PT * POINT
LINE_HEIGHT = 1.35
"""Of text, in font sizes."""


def for_print(fig: go.Figure, width: Width = "page", theme: Theme = "light", footer: str = "") -> go.Figure:
    """A copy of a figure for print.

    Args:
        width: a name of `WIDTHS`: "column" (89 mm), "page" (183 mm), or a preset such as "icml"; all text is at least
            6 points there.
        theme: "light" or "dark".
        footer: a line at the bottom, such as `short_provenance` gives; empty for none.

    Raises:
        InputError: an unknown width or theme.
    """
    if width not in WIDTHS:
        raise unknown("figure width", width, WIDTHS)
    check_theme(theme)
    size = WIDTHS[width]
    figure: Any = go.Figure(fig) if theme == "light" else _light_ink(fig)
    template: Any = TEMPLATES[theme]
    figure.update_layout(template=template, font={"size": size.font, "family": size.font_face.family})
    figure.update_layout(width=size.pixels, margin={"l": 40, "r": 8})
    letters = size.pixels * 0.95 / (LETTER * size.font) - _letters_left(figure)
    figure.for_each_xaxis(lambda axis: _break_labels(axis, letters))
    figure.update_annotations(font_size=size.font)
    for trace in figure.data:
        _shrink(trace, size)
    below = _room_below(figure, size) + (2.5 * FOOTER_PX if footer else 0)
    titles = _room_for_titles(figure, size)
    above = _fit_legend(figure, size) + titles
    planned = figure.layout.margin
    screen = template.layout.margin
    plot = (figure.layout.height or 420) - (planned.t or screen.t) - (planned.b or screen.b)
    plot = min(plot * size.shrink, size.most_mm * PIXELS_PER_MM - above - below)
    figure.update_layout(margin={"t": above, "b": below}, height=round(plot + above + below))
    figure.update_layout(legend={"yref": "paper", "yanchor": "bottom", "y": 1 + titles / plot, "maxheight": 1.0})
    figure.update_layout(meta={**(figure.layout.meta or {}), "titles": titles})
    if footer:
        figure.update_layout(title={"text": footer, "font": {"size": FOOTER_PX}, **_AT_BOTTOM})
    return figure


def _light_ink(fig: go.Figure) -> go.Figure:
    """A copy whose black marks are as light as the text of a dark page."""
    return go.Figure(json.loads(str(fig.to_json()).replace(f'"{BLACK}"', f'"{DARK_INK}"')))


_AT_BOTTOM: dict[str, Any] = {
    "xref": "container",
    "x": 0.01,
    "xanchor": "left",
    "yref": "container",
    "y": 0.0,
    "yanchor": "bottom",
    "pad": {"b": 3},
}
"""The only text that plotly places from the edge of the image."""


# --- Room above: the legend, packed into as few lines as its words allow, and the titles of panels

WRAPS = (60, 34, 28, 22, 17, 13)
"""Characters after which the words of a legend may go on below."""
SYMBOL = 40
"""Pixels of plotly's legend beside an entry's words: its mark, and the gaps."""
LETTER = 0.56
"""Width of a letter on average, in font sizes."""


def legend_names(figure: Any) -> list[str]:
    """The entries of a figure's legend, in its order, each once."""
    shown = [t for t in figure.data if t.showlegend is not False and t.type != "heatmap"]
    return list(dict.fromkeys(str(t.name) for t in shown if t.name)) if figure.layout.showlegend is not False else []


def _fit_legend(figure: Any, size: PrintSize) -> float:
    """Break the legend's words so that it takes the fewest lines; returns its height in pixels."""
    names = legend_names(figure)
    if len(names) < 2 and not (names and any(t.showlegend for t in figure.data)):
        return 6.0
    room = size.pixels - 16
    options = [(_legend_lines(names, broken, room, size.font), broken) for broken in WRAPS]
    lines, broken = min(options, key=lambda option: option[0])
    for trace in figure.data:
        if trace.name:
            trace.name = "<br>".join(_wrapped(str(trace.name), broken))
    figure.update_layout(legend={"tracegroupgap": 0, "font": {"size": size.font}})
    return lines * LINE_HEIGHT * size.font + 8


def _wrapped(name: str, width: int) -> list[str]:
    """Lines of escaped text; text with tags stays as it is, and no word is broken."""
    if "<" in name:
        return [name]
    lines = wrap(html.unescape(name), width, break_long_words=False) or [""]
    return [html.escape(line, quote=False) for line in lines]


def _legend_lines(names: Sequence[str], width: int, room: float, font: float) -> int:
    """Lines that plotly needs: all entries in one row, else in columns as wide as the widest entry."""
    broken = [_wrapped(name, width) for name in names]
    widths = [max(map(len, lines)) * LETTER * font + SYMBOL for lines in broken]
    tallest = max(map(len, broken))
    if sum(widths) <= room:
        return tallest
    columns = max(1, int(room // max(widths)))
    rows = [broken[i : i + columns] for i in range(0, len(broken), columns)]
    return sum(max(map(len, row)) for row in rows) if columns > 1 else ceil(sum(map(len, broken)))


def _room_for_titles(figure: Any, size: PrintSize) -> float:
    """Pixels for the titles above the upper panels."""
    above = [n for n in figure.layout.annotations if n.yref == "paper" and n.yanchor == "bottom" and n.y == 1]
    for note in above:
        note.text = "<br>".join(_wrapped(note.text, _title_width(size, len(above))))
    return max((_lines(note.text) for note in above), default=0) * LINE_HEIGHT * size.font + 6


def _title_width(size: PrintSize, titles: int) -> int:
    """Characters of a panel's title before it meets its neighbour."""
    return max(12, int((size.pixels - 60) / titles / (LETTER * size.font)) - 2)


# --- Room below: labels, the axis title and the footer


def _room_below(figure: Any, size: PrintSize) -> float:
    """Pixels for tick labels and axis titles: plotly's own margin leaves no room for the footer."""
    axes = [axis for axis in figure.select_xaxes() if axis.visible is not False]
    if not axes:
        return 12
    ticks = max(_tick_lines(axis) for axis in axes)
    titles = max(_lines(axis.title.text) if axis.title.text else 0 for axis in axes)
    return (ticks + titles) * LINE_HEIGHT * size.font + 14


def _tick_lines(axis: Any) -> float:
    """Lines that the labels of an axis take: upright ones as many as they are long."""
    labels = axis.ticktext or ("",)
    if axis.tickangle:
        return max(map(len, labels)) * LETTER / LINE_HEIGHT
    return max(_lines(label) for label in labels)


def _lines(text: str) -> int:
    return text.count("<br>") + 1


def _letters_left(figure: Any) -> int:
    """Letters that labels and title take left of the panels."""
    labels = [str(text) for axis in figure.select_yaxes() for text in axis.ticktext or ()]
    labels += [str(y) for trace in figure.data for y in (trace.y if trace.y is not None else ()) if isinstance(y, str)]
    return 4 + max((len(line) for text in labels for line in text.split("<br>")), default=6)


def _break_labels(axis: Any, letters_across: float) -> None:
    """Labels stay level, and no wider than their share of the axis: plotly would turn them, or leave some out."""
    low, high = axis.domain or (0, 1)
    room = (high - low) * letters_across
    if axis.title.text:
        title = axis.title.text.replace("<br>", " ")
        axis.title.text = "<br>".join(_wrapped(title, max(12, int(room))))
    if axis.ticktext:
        letters = max(5, int(room / len(axis.ticktext)))
        if not axis.tickangle:
            broken = ["<br>".join(_wrapped(label.replace("<br>", " "), letters)) for label in axis.ticktext]
            axis.update(ticktext=broken, tickangle=0)


def _shrink(trace: Any, size: PrintSize) -> None:
    if trace.type == "heatmap":
        trace.update(colorbar={"thickness": 12, "title": {"font": {"size": size.font}}})
        return
    if isinstance(trace.marker.size, (int, float)):
        trace.update(marker={"size": max(3.0, trace.marker.size * size.shrink)})
    line = getattr(trace, "line", None)
    if line is not None and isinstance(line.width, (int, float)) and line.width > 1:
        trace.update(line={"width": max(0.8, line.width * size.shrink)})
    if "text" in (getattr(trace, "mode", None) or ""):
        trace.update(textfont={"size": size.font})
