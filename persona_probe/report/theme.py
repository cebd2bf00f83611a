"""One look for every figure: a plotly template, colour-blind-safe colours, small helpers."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from persona_probe.errors import unknown
from persona_probe.stats import Estimate

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8A8A8A"
"""The palette of Okabe and Ito (2008), and a grey for whatever is a reference."""

INTERVAL = ("estimate", "ci_low", "ci_high")

_AXIS = {
    "showline": True,
    "linecolor": GREY,
    "gridcolor": "rgba(138,138,138,0.22)",
    "zeroline": False,
    "ticks": "outside",
    "tickcolor": GREY,
    "title": {"standoff": 8},
}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif", "size": 13, "color": "#1b1f24"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": [BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY],
        # An axis may widen only its own margin: two that both push width and height can chase each other for ever.
        "xaxis": {**_AXIS, "automargin": "bottom"},
        "yaxis": {**_AXIS, "automargin": "left"},
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "title": {"text": ""},
        },
        "margin": {"l": 64, "r": 16, "t": 64, "b": 56},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": BLUE},
        "hoverlabel": {"font": {"size": 12}},
        "hovermode": "closest",
    }
)


Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = ("light", "dark")
DARK_TEMPLATE = go.layout.Template(TEMPLATE).update(
    layout={"font": {"color": "#e6e8eb"}, "paper_bgcolor": "#14171c", "hoverlabel": {"bgcolor": "#20252c"}}
)
TEMPLATES: dict[Theme, go.layout.Template] = {"light": TEMPLATE, "dark": DARK_TEMPLATE}
"""The same look on a light and on a dark page."""


def finish(fig: go.Figure, caption: str, height: int = 420) -> go.Figure:
    """Give a figure the template, its height in pixels and its caption (`fig.layout.meta["caption"]`)."""
    fig.update_layout(template=TEMPLATE, height=height, meta={"caption": caption})
    return fig


def empty_figure(message: str) -> go.Figure:
    """A figure without data, with the reason: its stage has not run."""
    fig = go.Figure()
    fig.add_annotation(text=message, showarrow=False, x=0.5, y=0.5, xref="paper", yref="paper")
    fig.update_xaxes(visible=False)
    fig.update_yaxes(visible=False)
    return finish(fig, message, height=180)


def _fade(colour: str, alpha: float) -> str:
    """A hex colour as `rgba(...)` with the given opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


def plain(text: object, limit: int = 48) -> str:
    """Untrusted text for a label: shortened, on one line, and shown as it is rather than read as markup."""
    return html.escape(_shortened(text, limit), quote=False)


def wrapped(text: object, width: int = 16) -> str:
    """`plain` for a tick of an axis, broken into short lines so that neighbours do not meet."""
    return "<br>".join(html.escape(line, quote=False) for line in wrap(_shortened(text, 48), width))


def _shortened(text: object, limit: int) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def error_bars(rows: pd.DataFrame, colour: str, columns: Sequence[str] = INTERVAL) -> dict[str, Any]:
    """Plotly error bars from three columns: the estimate and the ends of its interval."""
    centre, low, high = (rows[column] for column in columns)
    return {
        "type": "data",
        "symmetric": False,
        "array": high - centre,
        "arrayminus": centre - low,
        "color": colour,
        "thickness": 1.6,
        "width": 3,
    }


def ribbon(x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> go.Scatter:
    """A shaded interval along a line."""
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=_fade(colour, 0.15),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
    )


def interval_text(value: Estimate | None, signed: bool = True) -> str:
    """`+0.31 [+0.22, +0.40]`, or "not measured"."""
    if value is None:
        return "not measured"
    sign = "+" if signed else ""
    # rounding errors such as 1e-17 are shown as 0, and so is -0
    middle, low, high = (
        f"{0.0 if abs(v) < 5e-5 else v:{sign}.3g}" for v in (value.estimate, value.ci_low, value.ci_high)
    )
    return middle if value.ci_low != value.ci_low else f"{middle} [{low}, {high}]"


def estimate_text(value: float | None, low: float | None, high: float | None, missing: str = "not measured") -> str:
    """An estimate and the ends of its interval as `interval_text` shows them; `missing` if there is no estimate."""
    if value is None or value != value:
        return missing
    nan = float("nan")
    return interval_text(Estimate(value, nan if low is None else low, nan if high is None else high, 0))


def number(value: object, digits: int = 3) -> str:
    """A number in `digits` significant figures; a dash for a missing one."""
    if not isinstance(value, (int, float)) or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


# --- Figures for paper: one column or a whole page wide, legible at that size, with their origin as a footer

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
    figure: Any = go.Figure(fig)
    template: Any = TEMPLATES[theme]
    top = figure.layout.margin.t or template.layout.margin.t
    figure.update_layout(
        template=template,
        font_size=size.font,
        width=size.pixels,
        height=round((figure.layout.height or 420) * size.shrink) + round(2 * FOOTER_PX),
        margin={"t": max(14, top * size.shrink), "l": 40, "r": 8},
        title={"text": footer, "font": {"size": FOOTER_PX}, **_AT_BOTTOM},
    )
    figure.for_each_xaxis(lambda axis: _break_labels(axis, narrow=width == "column"))
    figure.update_layout(margin_b=_room_below(figure, size))
    figure.update_annotations(font_size=size.font)
    for trace in figure.data:
        _shrink(trace, size)
    return figure


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
    """Raise an `InputError` for an unknown theme."""
    if theme not in THEMES:
        raise unknown("figure theme", theme, THEMES)


def _room_below(figure: Any, size: PrintSize) -> float:
    """Pixels for tick labels, axis titles and the footer: plotly's own margin leaves no room for the footer."""
    axes = [axis for axis in figure.select_xaxes() if axis.visible is not False]
    if not axes:
        return 3 * FOOTER_PX
    ticks = max(_lines(label) for axis in axes for label in (axis.ticktext or ("",)))
    titles = max(_lines(axis.title.text or "") for axis in axes)
    longest_label = max((len(str(x)) for t in figure.data if t.type == "heatmap" for x in t.x), default=0)
    return (ticks + titles) * LINE_HEIGHT * size.font + 0.3 * longest_label * size.font + 12 + 2.5 * FOOTER_PX


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
