"""The two small plots of a feature card, as coordinates for inline SVG: a card needs no script, in a notebook too."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

from persona_probe.locate.feature_card import Activity, Push
from persona_probe.report.theme import number

WIDTH, HEIGHT = 360, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 350, 10, 130
"""Edges of the plotting area, in units of the SVG's view box."""
SERIES = ("base", "tuned", "third", "fourth")
"""CSS classes of the models, in their order."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """One bar or point."""

    x: float
    y: float
    width: float = 0
    height: float = 0
    low: float | None = None
    high: float | None = None
    hollow: bool = False
    title: str = ""


@dataclass(frozen=True)
class Series:
    """What one model adds to a plot."""

    name: str
    style: str
    marks: tuple[Mark, ...]
    path: str
    level: float | None = None
    """Height of the unsteered model's line."""


@dataclass(frozen=True)
class Plot:
    """Everything that the template draws."""

    series: tuple[Series, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_title: str
    y_title: str
    caption: str


Scale = Callable[[float], float]


def linear(low: float, high: float, start: float, stop: float) -> Scale:
    """The straight line that takes `low` to `start` and `high` to `stop`, rounded to tenths."""
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (stop - start), 1)


def histogram(activity: Sequence[Activity]) -> Plot | None:
    """Tokens by activation, on a log scale: bars for the base model, outlines for others; None where none fires."""
    filled = [i for one in activity for i, count in enumerate(one.counts) if count]
    if not filled:
        return None
    bins, width = max(filled) + 1, activity[0].bin_width
    most = max(max(one.counts, default=0) for one in activity)
    x = linear(0, bins * width, LEFT, RIGHT)
    y = linear(0, math.log10(1 + most), BOTTOM, TOP)
    series = tuple(_bars(one, style, bins, x, y) for one, style in zip(activity, cycle(SERIES), strict=False))
    powers = [10**k for k in range(math.floor(math.log10(most)) + 1)]
    rates = "; ".join(f"{one.model}: active on {one.firing_rate:.2%} of {one.tokens:,} tokens" for one in activity)
    return Plot(
        series=series,
        x_ticks=tuple(Tick(x(v), number(v)) for v in (0.0, bins * width / 2, bins * width)),
        y_ticks=(Tick(y(0), "0"), *(Tick(y(math.log10(1 + p)), f"{p:,}") for p in powers)),
        x_title="activation",
        y_title="tokens (log)",
        caption=f"How often each activation occurs ({rates}). Silent tokens are left out.",
    )


def _bars(one: Activity, style: str, bins: int, x: Scale, y: Scale) -> Series:
    width, marks, path = one.bin_width, [], [f"M{LEFT} {BOTTOM}"]
    for i, count in enumerate([*one.counts[:bins], *[0] * (bins - len(one.counts))]):
        left, right, top = x(i * width), x((i + 1) * width), y(math.log10(1 + count))
        path.append(f"V{top}H{right}")
        if count:
            title = f"{one.model}: {count:,} tokens from {number(i * width)} to {number((i + 1) * width)}"
            marks.append(Mark(left, top, round(right - left, 1), round(BOTTOM - top, 1), title=title))
    return Series(one.model, style, tuple(marks), "".join([*path, f"V{BOTTOM}"]))


def steering(pushes: Sequence[Push]) -> Plot | None:
    """The contrast index against signed strength, a line for each steered model; None where it was not steered."""
    if not pushes:
        return None
    strengths = sorted({p.strength for p in pushes} | {0.0})
    values = [v for p in pushes for v in (p.estimate, p.ci_low, p.ci_high, p.estimate - p.delta) if v is not None]
    x = linear(strengths[0], strengths[-1], LEFT + 8, RIGHT - 8)
    y = linear(min(values), max(values), BOTTOM - 4, TOP)
    models = list(dict.fromkeys(p.model for p in pushes))
    outside = sum(not p.within_bound for p in pushes)
    return Plot(
        series=tuple(_line(pushes, m, s, x, y) for m, s in zip(models, cycle(SERIES), strict=False)),
        x_ticks=tuple(Tick(x(v), f"{v:+g}" if v else "0") for v in _few(strengths)),
        y_ticks=tuple(Tick(y(v), number(v)) for v in (min(values), (min(values) + max(values)) / 2, max(values))),
        x_title=f"signed strength ({pushes[0].unit})",
        y_title="contrast index",
        caption=(
            f"Contrast index (nats per token) under steering, n = {len(pushes)} pushes with 95% intervals. Dotted: "
            f"unsteered. Hollow: the {outside} at which neutral perplexity leaves its bound."
        ),
    )


def _line(pushes: Sequence[Push], model: str, style: str, x: Scale, y: Scale) -> Series:
    own = sorted((p for p in pushes if p.model == model), key=lambda p: p.strength)
    marks = tuple(
        Mark(
            x(p.strength),
            y(p.estimate),
            low=None if p.ci_low is None else y(p.ci_low),
            high=None if p.ci_high is None else y(p.ci_high),
            hollow=not p.within_bound,
            title=f"{model}, {p.strength:+g} {p.unit}: {p.estimate:.3f}, perplexity x {number(p.perplexity_ratio)}",
        )
        for p in own
    )
    path = "M" + "L".join(f"{m.x} {m.y}" for m in marks)
    return Series(model, style, marks, path, y(sum(p.estimate - p.delta for p in own) / len(own)))


def _few(values: Sequence[float], most: int = 7) -> list[float]:
    """Ends, zero and as many others as there is room for."""
    step = math.ceil(len(values) / most)
    return [v for i, v in enumerate(values) if i % step == 0 or v == 0 or i == len(values) - 1]
