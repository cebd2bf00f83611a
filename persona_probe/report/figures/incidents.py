"""Watched answers of a server: alarms over time, rule by rule, and when it went back to another adapter."""

from datetime import datetime

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import GREY, PALETTE, VERMILLION, empty_figure, finish, plain

MISSING = "No incidents: `persona-probe serve RUN` has answered nobody, or raised no alarm."
COLUMNS = ["time", "kind", "adapter", "rule", "feature", "token", "value", "threshold"]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
PANEL_HEIGHT, MARGINS = 220, 140
"""Pixels of one rule's panel, and of everything around them."""


def incidents_data(records: Records) -> pd.DataFrame:
    """One row per incident, in order: the level that a rule reached and its threshold, both empty for a roll-back."""
    table = pd.DataFrame(records.incidents, columns=COLUMNS)
    return table.astype({"value": "float64", "threshold": "float64", "token": "Int64"})


@figure(
    name="incidents",
    title="Alarms while answers were watched",
    group="more",
    place=97,
    data=incidents_data,
    missing=MISSING,
)
def incidents(records: Records) -> go.Figure:
    """A panel a rule: levels at which it fired, over time, with its threshold; a colour an adapter."""
    data = incidents_data(records)
    if data.empty:
        return empty_figure(MISSING)
    data["time"] = [datetime.fromisoformat(time) for time in data["time"]]
    alarms, back = (data[data["kind"] == kind] for kind in ("alarm", "rollback"))
    rules = list(dict.fromkeys(alarms["rule"])) or [""]
    titles = [plain(rule) for rule in rules]
    spacing = 0.1 / max(1, len(rules) - 1)
    fig = make_subplots(len(rules), 1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=spacing)
    adapters = list(dict.fromkeys(data["adapter"]))
    for number, adapter in enumerate(adapters):
        colour, symbol = PALETTE[number % len(PALETTE)], SYMBOLS[number % len(SYMBOLS)]
        for row, rule in enumerate(rules, 1):
            own = select.where(alarms, adapter=adapter, rule=rule)
            fig.add_scatter(
                x=own["time"],
                y=own["value"],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 8},
                name=plain(adapter),
                legendgroup=str(adapter),
                showlegend=row == 1,
                hovertemplate="%{x}: %{y:.3g}<extra></extra>",
                row=row,
                col=1,
            )
    for row, rule in enumerate(rules, 1):
        own = select.where(alarms, rule=rule).drop_duplicates("threshold")
        for threshold in own["threshold"]:
            fig.add_hline(threshold, line={"color": GREY, "dash": "dot", "width": 1.2}, row=row, col=1)  # pyright: ignore
        for time in back["time"]:
            fig.add_vline(time, line={"color": VERMILLION, "width": 1.6}, row=row, col=1)  # pyright: ignore
        fig.update_yaxes(title_text="level", row=row, col=1)
    fig.update_xaxes(title_text="time (UTC)", row=len(rules), col=1)
    fig.update_layout(legend={"y": 1 + 0.14 / len(rules)}, margin={"t": 100})  # above the heads
    return finish(fig, _caption(len(alarms), len(back)), height=MARGINS + PANEL_HEIGHT * len(rules))


def _caption(alarms: int, back: int) -> str:
    lines = f" Vertical lines: the server went back to an earlier adapter, {back} times." if back else ""
    return (
        f"Answers in which a rule fired, n = {alarms} alarms: the level there, in units of the feature; dotted, the "
        f"rule's threshold.{lines} Answers without an alarm are not recorded, so this shows no rate. Control: how "
        "often a rule fires at clean answers of the base stands with its threshold in answer-thresholds.json."
    )
