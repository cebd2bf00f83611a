"""The figure of a monitor's history: features with interval and base band, alarms, behaviour, explained variance."""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import isnan, nan
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.monitor.events import Alarm, Behaviour, FeatureValue, Reading
from persona_probe.monitor.history import History
from persona_probe.report.theme import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    TEMPLATE,
    VERMILLION,
    empty_figure,
    plain,
    ribbon,
)

MOST_ALARMS = 40
"""Latest alarms that are drawn; the page lists more."""
SYMBOLS = ("circle", "square", "diamond", "x", "star")


@dataclass(frozen=True)
class Curve:
    """A line over steps with its interval; without an interval `low` and `high` are empty or NaN."""

    steps: list[int]
    values: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


def feature_curve(readings: Sequence[Reading], name: str) -> Curve:
    """A feature's mean with its interval, in the feature's units; readings without the feature are left out."""
    points = _of(readings, name)
    ends = [f.ci_low for _, f in points], [f.ci_high for _, f in points]
    return Curve([step for step, _ in points], [f.mean for _, f in points], *ends)


def shift_curve(readings: Sequence[Reading], name: str) -> Curve:
    """The same in base standard deviations from the base model."""
    points = [(step, f) for step, f in _of(readings, name) if f.base_sd > 0]
    low = [(f.ci_low - f.base_mean) / f.base_sd for _, f in points]
    high = [(f.ci_high - f.base_mean) / f.base_sd for _, f in points]
    return Curve([step for step, _ in points], [f.shift for _, f in points], low, high)


def draw_curve(
    fig: go.Figure,
    curve: Curve,
    name: str,
    colour: str,
    place: tuple[int, int],
    dashed: bool,
    symbol: int = 0,
    **trace: Any,
) -> None:
    """A line with markers (of the given symbol) and its interval shaded, in the panel at `place` (row, column)."""
    where: dict[str, Any] = {"row": place[0], "col": place[1]}
    known = [i for i, (a, b) in enumerate(zip(curve.low, curve.high, strict=True)) if not isnan(a) and not isnan(b)]
    if known:
        x, low, high = ([part[i] for i in known] for part in (curve.steps, curve.low, curve.high))
        fig.add_trace(ribbon(x, low, high, colour), **where)
    fig.add_scatter(
        x=curve.steps,
        y=[None if isnan(value) else value for value in curve.values],
        name=name,
        mode="lines+markers",
        line={"color": colour, "width": 2.2, "dash": "dash" if dashed else "solid"},
        marker={"size": 6, "symbol": SYMBOLS[symbol % len(SYMBOLS)] + ("-open" if dashed else "")},
        hovertemplate=f"{name}<br>step %{{x}}: %{{y:.4g}}<extra></extra>",
        **trace,
        **where,
    )


def alarm_marks(
    fig: go.Figure, history: History, names: Collection[str], place: tuple[int, int], shift: bool = False
) -> None:
    """Red lines at the alarms of a panel's features or measurements, and a marker on the curve of each.

    Alarms that name none of the history are drawn in every panel, the others only where their curve is.
    """
    known = {*history.features, *history.behaviours}
    alarms = [a for a in history.alarms if a.feature in names or a.feature not in known][-MOST_ALARMS:]
    for alarm in alarms:
        line = {"color": VERMILLION, "width": 1.4, "dash": "dash"}
        fig.add_vline(x=alarm.step, line=line, row=place[0], col=place[1])  # pyright: ignore[reportArgumentType]
    points = [(a, y) for a in alarms if (y := _height(history, a, shift)) is not None]
    if points:
        fig.add_scatter(
            x=[alarm.step for alarm, _ in points],
            y=[y for _, y in points],
            mode="markers",
            marker={"color": VERMILLION, "size": 11, "symbol": "triangle-up", "line": {"color": "#ffffff", "width": 1}},
            text=[f"{plain(a.rule)}<br>{plain(a.message, 120)}" for a, _ in points],
            hovertemplate="step %{x}: %{text}<extra></extra>",
            showlegend=False,
            row=place[0],
            col=place[1],
        )


def _height(history: History, alarm: Alarm, shift: bool) -> float | None:
    """Where the alarm's feature or measurement stood: at its step, or the reading before it."""
    measured = [] if alarm.feature in history.features else history.behaviours.get(alarm.feature, [])
    if i := bisect_right([event.step for event in measured], alarm.step):
        value = measured[i - 1].value
        return None if isnan(value) else value
    for readings in history.readings.values():
        points = _of(readings, alarm.feature)
        if i := bisect_right([step for step, _ in points], alarm.step):
            value = points[i - 1][1].shift if shift else points[i - 1][1].mean
            return None if isnan(value) else value
    return None


def _of(readings: Sequence[Reading], name: str) -> list[tuple[int, FeatureValue]]:
    return [(r.step, f) for r in readings for f in r.features if f.name == name]


# --- The whole figure

MOST_PANELS = 6
"""More features than this share one panel, in base standard deviations."""
PANEL, GAP, MARGIN = 190, 52, 110
"""Pixels: height of a feature's panel, space between panels, and space for the legend and the axis title."""
MODE_COLOURS = {"probe": BLUE, "passive": ORANGE}
COLOURS = (BLUE, GREEN, PURPLE, ORANGE, SKY, GREY)
ALL = ""
"""The panel that all features share."""


def monitor_figure(history: History, caption: str = "Features while the model trains.") -> go.Figure:
    """The history as one figure; names of features, rules and behaviour are shown as plain text.

    Left, one panel per feature: mean with its 95% interval, the base model's mean (dotted) and base band (grey), and
    alarms as red lines. Right: behaviour, and the SAE's explained variance.
    """
    if not history.readings and not history.behaviours:
        return empty_figure("no reading yet")
    names = history.features
    left = names if 0 < len(names) <= MOST_PANELS else [ALL]
    right = [name for name, known in (("behaviour", history.behaviours), ("fit", _has_fit(history))) if known]
    height = MARGIN + max(len(left) * (PANEL + GAP), 2 * (PANEL + GAP))
    fig = _grid(len(left), len(right), height)
    for i, name in enumerate(left):
        row = 1 + i * max(len(right), 1)
        _draw_features(fig, history, name, row)
    for i, name in enumerate(right):
        draw = _draw_behaviour if name == "behaviour" else _draw_fit
        draw(fig, history, 1 + i * len(left))
    bottom = {1: 1 + (len(left) - 1) * max(len(right), 1), 2: 1 + (len(right) - 1) * len(left)}
    for col, row in bottom.items():
        if col == 1 or right:
            fig.update_xaxes(title_text="training step", row=row, col=col)
    return _finish(fig, caption, height)


def _grid(left: int, right: int, height: int) -> go.Figure:
    """Two columns of the same height, with `left` and `right` panels."""
    rows, columns = left * max(right, 1), 2 if right else 1
    specs: list[list[dict[str, int] | None]] = [[None] * columns for _ in range(rows)]
    for i in range(left):
        specs[i * max(right, 1)][0] = {"rowspan": max(right, 1)}
    for i in range(right):
        specs[i * left][1] = {"rowspan": left}
    widths = {"column_widths": [0.62, 0.38], "horizontal_spacing": 0.09} if right else {}
    return make_subplots(rows, columns, specs=specs, vertical_spacing=GAP / (height - MARGIN), **widths)


def _draw_features(fig: go.Figure, history: History, name: str, row: int) -> None:
    if name == ALL:
        _draw_shifts(fig, history, row)
        return
    title = plain(name)
    _draw_base(fig, history, name, row)
    several = len(history.readings) > 1
    for mode, readings in history.readings.items():
        curve = feature_curve(readings, name)
        legend = {"legendgroup": mode, "showlegend": several and row == 1}
        draw_curve(fig, curve, plain(mode), MODE_COLOURS.get(mode, GREEN), (row, 1), mode != "probe", **legend)
    latent = next((f.latent for r in history.readings.values() for f in r[-1].features if f.name == name), -1)
    _label(fig, row, 1, f"{title}, latent {latent}" if latent >= 0 else title)
    fig.update_yaxes(title_text="activation" if latent >= 0 else "projection", row=row, col=1)
    alarm_marks(fig, history, [name], (row, 1))


def _draw_shifts(fig: go.Figure, history: History, row: int) -> None:
    _draw_shared_band(fig, history, row)
    for i, name in enumerate(history.features):
        for mode, readings in history.readings.items():
            first = mode == next(iter(history.readings))
            legend = {"legendgroup": f"feature {i}", "showlegend": first}
            curve, colour = shift_curve(readings, name), COLOURS[i % len(COLOURS)]
            draw_curve(fig, curve, plain(name), colour, (row, 1), mode != "probe", i // len(COLOURS), **legend)
    _label(fig, row, 1, f"{len(history.features)} features")
    fig.update_yaxes(title_text="shift (base sd)", row=row, col=1)
    alarm_marks(fig, history, history.features, (row, 1), shift=True)


def _draw_shared_band(fig: go.Figure, history: History, row: int) -> None:
    """The base band in base standard deviations, where it is the same for every feature."""
    bands = history.start.bands if history.start else {}
    last = [f for r in [history.latest] if r for f in r.features if f.name in bands and f.base_sd > 0]
    ends = {tuple(round((end - f.base_mean) / f.base_sd, 3) for end in bands[f.name]) for f in last}
    if len(ends) == 1:
        low, high = ends.pop()
        fig.add_trace(ribbon(_span(history), [low, low], [high, high], GREY), row=row, col=1)


def _draw_base(fig: go.Figure, history: History, name: str, row: int) -> None:
    ends = _span(history)
    if history.start is not None and name in history.start.bands:
        low, high = history.start.bands[name]
        fig.add_trace(ribbon(ends, [low, low], [high, high], GREY), row=row, col=1)
    base = next((f.base_mean for r in history.readings.values() for f in r[-1].features if f.name == name), None)
    if base is not None and not isnan(base):
        line = {"color": GREY, "dash": "dot", "width": 1.4}
        place = {"row": row, "col": 1}
        fig.add_scatter(x=ends, y=[base, base], mode="lines", line=line, hoverinfo="skip", showlegend=False, **place)


def _span(history: History) -> list[float]:
    steps = [r.step for readings in history.readings.values() for r in readings] or [0]
    return [min(steps), max(max(steps), min(steps) + 1)]


def _draw_behaviour(fig: go.Figure, history: History, row: int) -> None:
    for i, (name, points) in enumerate(history.behaviours.items()):
        ends = [[nan if end is None else end for end in side] for side in _ends(points)]
        curve = Curve([p.step for p in points], [p.value for p in points], *ends)
        colour, several = COLOURS[(i + 1) % len(COLOURS)], len(history.behaviours) > 1
        draw_curve(fig, curve, plain(name), colour, (row, 2), False, showlegend=several)
    only = next(iter(history.behaviours)) if len(history.behaviours) == 1 else "behaviour"
    _label(fig, row, 2, plain(only))
    alarm_marks(fig, history, list(history.behaviours), (row, 2))


def _ends(points: list[Behaviour]) -> tuple[list[float | None], list[float | None]]:
    return [p.ci_low for p in points], [p.ci_high for p in points]


def _draw_fit(fig: go.Figure, history: History, row: int) -> None:
    for mode, readings in history.readings.items():
        values = [r.explained_variance for r in readings]
        curve = Curve([r.step for r in readings], values)
        colour = MODE_COLOURS.get(mode, GREEN)
        draw_curve(fig, curve, plain(mode), colour, (row, 2), mode != "probe", showlegend=False)
    _label(fig, row, 2, "SAE fit: explained variance")
    fig.update_yaxes(rangemode="tozero", row=row, col=2)
    alarm_marks(fig, history, [], (row, 2))


def _has_fit(history: History) -> bool:
    return any(not isnan(r.explained_variance) for readings in history.readings.values() for r in readings)


def _label(fig: go.Figure, row: int, col: int, text: str) -> None:
    """A panel's name above its left corner."""
    where = {"xref": "x domain", "yref": "y domain", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}
    fig.add_annotation(text=f"<b>{text}</b>", showarrow=False, row=row, col=col, **where)


def _finish(fig: go.Figure, caption: str, height: int) -> go.Figure:
    fig.update_xaxes(matches="x", rangemode="tozero")
    fig.update_layout(template=TEMPLATE, height=height, meta={"caption": caption}, uirevision="keep")
    fig.update_layout(legend={"y": 1.0, "yref": "container", "yanchor": "top"}, margin={"t": 56})
    return fig
