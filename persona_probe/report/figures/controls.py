"""The persona feature next to the mean difference and random latents, each in units of its spread on the base."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import DIRECTION, FEATURE, GREY, empty_figure, finish, plain

MISSING = "No readings yet: the track stage has not run."
PANEL_HEIGHT, MARGINS = 244, 152
"""Pixels of one panel with its gap, and of the margins above and below."""
COLUMNS = ["arm", "feature", "seed", "step", "z", "n"]
STYLES = {
    select.PERSONA: {"color": FEATURE, "width": 2.6},
    "mean difference": {"color": DIRECTION, "width": 2.2},
    "random latent A": {"color": GREY, "width": 1.4},
    "random latent B": {"color": GREY, "width": 1.4, "dash": "dash"},
}
OTHER = {"color": GREY, "width": 1, "dash": "dot"}


def controls_data(records: Records) -> pd.DataFrame:
    """Readings as `z` = (mean - base mean) / base standard deviation over probes; NaN where the base never varies."""
    rows = records.readings.loc[records.readings["arm"].isin(records.arms.induced)]
    spread = select.numbers(rows, "base_sd")
    rise = select.numbers(rows, "mean") - select.numbers(rows, "base_mean")
    z = np.divide(rise, spread, out=np.full(len(rows), np.nan), where=spread > 0)
    table = rows.assign(z=z).rename(columns={"n_probes": "n"})[COLUMNS]
    return table.sort_values(["arm", "feature", "seed", "step"]).reset_index(drop=True)


@figure(
    name="controls",
    title="The feature and its controls",
    group="study",
    place=70,
    data=controls_data,
    missing=MISSING,
)
def controls(records: Records) -> go.Figure:
    """One panel per arm; thin lines are seeds, thick lines their mean."""
    data = controls_data(records)
    if data.empty:
        return empty_figure(MISSING)
    arms = [arm for arm in records.arms.induced if arm in set(data["arm"])]
    titles = [f"{plain(records.arms.label(arm))} arm" for arm in arms]
    n = len(arms)
    panels = {"shared_xaxes": True, "shared_yaxes": "all", "vertical_spacing": 0.2 / n}
    fig = make_subplots(rows=n, cols=1, subplot_titles=titles, **panels)
    features = sorted(select.distinct(data, "feature"), key=lambda f: (list(STYLES).index(f) if f in STYLES else 99, f))
    for panel, arm in enumerate(arms, 1):
        for feature in features:
            _draw_feature(fig, select.where(data, arm=arm, feature=feature), feature, panel)
        fig.add_hline(y=0, line={"color": GREY, "dash": "dot", "width": 1}, row=panel, col=1)  # pyright: ignore[reportArgumentType]
        fig.update_yaxes(title_text="change from base<br>(base standard deviations)", row=panel, col=1)
    fig.update_xaxes(title_text="training step", row=n, col=1)
    fig.update_layout(margin={"t": 96}, legend={"y": 1 + 0.12 / n})
    return finish(fig, _caption(data), height=MARGINS + PANEL_HEIGHT * n)


def _draw_feature(fig: go.Figure, rows: pd.DataFrame, feature: str, panel: int) -> None:
    if np.isnan(select.numbers(rows, "z")).all():
        return
    style, place = STYLES.get(feature, OTHER), {"row": panel, "col": 1}
    for (seed,), line in select.groups(rows, "seed"):
        thin = {"line": {**style, "width": 1}, "opacity": 0.4, "mode": "lines", "showlegend": False}
        fig.add_scatter(x=line["step"], y=line["z"], name=f"{plain(feature)}, seed {seed}", **thin, **place)
    mean = [(step, select.numbers(group, "z").mean()) for (step,), group in select.groups(rows, "step")]
    shared = {"legendgroup": feature, "showlegend": panel == 1, "mode": "lines+markers"}
    x, y = [step for step, _ in mean], [z for _, z in mean]
    fig.add_scatter(x=x, y=y, name=plain(feature), line=style, marker={"size": 6}, **shared, **place)


def _caption(data: pd.DataFrame) -> str:
    flat = select.distinct(data.loc[data["z"].isna()], "feature")
    note = f" Not drawn, because it never varies on the base model: {', '.join(flat)}." if flat else ""
    probes = max(select.distinct(data, "n"))
    return (
        f"Readings on n = {probes:g} probes as the change from the base model, in units of that feature's "
        f"standard deviation over probes on the base model; {select.seed_count(data)} (thin) and their mean. Controls: "
        "the mean-difference projection, two random latents, and the correct arm. A persona feature should rise in "
        f"the incorrect arm, not in the correct one, and further than the random latents.{note}"
    )
