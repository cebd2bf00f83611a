"""One look for every figure: a plotly template, colour-blind-safe colours, small helpers."""

import html
from collections.abc import Sequence
from textwrap import wrap
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from persona_probe.errors import unknown
from persona_probe.stats import Estimate

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8A8A8A"
"""The palette of Okabe and Ito (2008), and a grey for whatever is a reference. In every figure the arms have them:
vermillion is training on bad data, blue good data (the control), green and purple corrections, others further arms."""
BEHAVIOUR = BLACK
"""What a model says, where it is not told apart by arms: the contrast index, a score."""
FEATURE, DIRECTION, CANDIDATE = "#7B5CD6", "#A6611A", "#5F6B7A"
"""The persona feature, the mean difference of the arms, other candidate latents."""
HARM, REGISTER = "#C2417F", "#128A8A"
"""The two main effects of the 2x2 set."""
PALETTE = ("#2F9A88", "#117733", "#8F8F2A", "#AA4499", "#4477AA", "#D4526E")
"""For categories without a meaning of their own, such as rankers: no colour above is among them."""

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
DARK_INK = "#e6e8eb"
DARK_TEMPLATE = go.layout.Template(TEMPLATE).update(
    layout={"font": {"color": DARK_INK}, "paper_bgcolor": "#14171c", "hoverlabel": {"bgcolor": "#20252c"}}
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


def interval_marks(
    rows: pd.DataFrame,
    colour: str,
    symbol: str | Sequence[str],
    size: int,
    x: Sequence[str] = INTERVAL,
    y: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Arguments of `add_scatter` for a mark at each estimate, with its interval.

    Args:
        x: columns of the estimate and the ends of its interval, drawn across.
        y: columns of a second one, drawn upwards; None where the caller gives each mark its row of the figure.
    """
    marks: dict[str, Any] = {"mode": "markers", "marker": {"color": colour, "symbol": symbol, "size": size}}
    marks |= {"x": rows[x[0]], "error_x": error_bars(rows, colour, x)}
    return marks if y is None else marks | {"y": rows[y[0]], "error_y": error_bars(rows, colour, y)}


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


def interval_text(value: Estimate | None, signed: bool = True, places: int | None = None) -> str:
    """`+0.31 [+0.22, +0.40]`, or "not measured".

    Args:
        signed: whether a positive number has its sign.
        places: digits after the point, for columns that are read downwards; None takes three significant digits.
    """
    if value is None:
        return "not measured"
    form = ("+" if signed else "") + (".3g" if places is None else f".{places}f")
    # rounding errors such as 1e-17 are shown as 0, and so is -0
    middle, low, high = (f"{0.0 if abs(v) < 5e-5 else v:{form}}" for v in (value.estimate, value.ci_low, value.ci_high))
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


def check_theme(theme: str) -> None:
    """Raise an `InputError` for an unknown theme."""
    if theme not in THEMES:
        raise unknown("figure theme", theme, THEMES)
