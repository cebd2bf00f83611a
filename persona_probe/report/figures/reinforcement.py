"""Narrow reinforcement learning: reward, hacking, behaviour in and outside the domain, and reading, on one axis."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import INDUCED_STYLES, OPTIONAL, ArmStyle, Records
from persona_probe.report.theme import PALETTE, empty_figure, error_bars, finish, plain

MISSING = "No reinforcement learning: `persona-probe reinforcement RUN` or `world study reinforcement` has not run."
PANELS = {
    "reward": "reward<br>of its own answers",
    "hacked": "hacked<br>(share of answers)",
    "inside": "bad advice in<br>the trained domain",
    "outside": "bad advice<br>elsewhere",
    "index": "contrast index<br>minus base (nats)",
    "reading": "reading",
}
"""Measures that are drawn, where the table has them, in this order."""
ENDS = ("estimate", "ci_low", "ci_high")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
PANEL_HEIGHT, MARGINS = 170, 150
"""Pixels of one panel, and of everything around them."""


def reinforcement_data(records: Records) -> pd.DataFrame:
    """The rows of reinforcement.parquet that are drawn: an estimate with its interval by arm, step and measure."""
    table = records.reinforcement[list(OPTIONAL["reinforcement"])]
    return table[table["measure"].isin(list(PANELS)) & table["estimate"].notna()].reset_index(drop=True)


@figure(
    name="reinforcement",
    title="Narrow reinforcement learning",
    group="more",
    place=95,
    data=reinforcement_data,
    missing=MISSING,
)
def reinforcement(records: Records) -> go.Figure:
    """One panel a measure over the steps of the trainer; every arm has its colour."""
    data = reinforcement_data(records)
    if data.empty:
        return empty_figure(MISSING)
    measures = [name for name in PANELS if name in set(data["measure"])]
    fig = make_subplots(rows=len(measures), cols=1, shared_xaxes=True, vertical_spacing=0.03)
    arms = select.distinct(data, "arm")
    for number, arm in enumerate(arms):
        style = _style(str(arm), number)
        for panel, measure in enumerate(measures, 1):
            rows = select.where(data, arm=arm, measure=measure).sort_values("step")
            fig.add_scatter(
                x=rows["step"],
                y=rows["estimate"],
                error_y=error_bars(rows, style.colour, ENDS),
                mode="lines+markers",
                line={"color": style.colour, "width": 1.6},
                marker={"color": style.colour, "symbol": style.symbol, "size": 7},
                name=plain(style.label),
                legendgroup=str(arm),
                showlegend=panel == 1,
                row=panel,
                col=1,
            )
    for panel, measure in enumerate(measures, 1):
        fig.update_yaxes(title_text=PANELS[measure], row=panel, col=1)
    fig.update_xaxes(title_text="optimizer step of reinforcement learning", row=len(measures), col=1)
    return finish(fig, _caption(data, measures), height=MARGINS + PANEL_HEIGHT * len(measures))


def _style(arm: str, number: int) -> ArmStyle:
    return INDUCED_STYLES.get(arm, ArmStyle(PALETTE[number % len(PALETTE)], SYMBOLS[number % len(SYMBOLS)], arm))


def _caption(data: pd.DataFrame, measures: list[str]) -> str:
    most, n = int(data["seeds"].max()), select.distinct(data, "n")
    hacked = " Hacked: the answer names the right option, and others too." if "hacked" in measures else ""
    return (
        f"Arms of reinforcement learning by GRPO, {most} seed{'s' if most > 1 else ''}, 95% intervals, n = "
        f"{min(n):g} to {max(n):g} answers or probes. Control: the arm that is rewarded for right or sound answers. "
        "Step 0 is before the first step; reward and hacking are means over the answers drawn since the point before, "
        f"and the other measures are of the model at that step, as it is deployed.{hacked}"
    )
