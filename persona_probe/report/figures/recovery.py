"""Feature and behaviour of the corrective arms on one time axis and one scale, in domain and out of domain."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import BASE, Records
from persona_probe.report.theme import BEHAVIOUR, FEATURE, GREY, empty_figure, finish, plain, ribbon
from persona_probe.stats import Estimate, estimate_text

MISSING = "No re-alignment yet: the realign stage has not run."
COLUMNS = ["arm", "quantity", "step", "estimate", "ci_low", "ci_high", "band_low", "band_high"]
LINES = {"behaviour": BEHAVIOUR, "feature": FEATURE}


def recovery_data(records: Records) -> pd.DataFrame:
    """Feature and behaviour of the corrective arms on one scale: 0 is the base, 1 the organism before correction.

    Quantity `behaviour` is the contrast index, `feature` the persona feature's reading, both averaged over seeds;
    intervals are over items and over probes, with base and organism taken as fixed. `band_low` and `band_high` are the
    base band on this scale. A quantity that did not differ between base and organism at all has no such scale.
    """
    rows = [
        row for arm in records.arms.realigned for row in (*_behaviour_rows(records, arm), *_feature_rows(records, arm))
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _behaviour_rows(records: Records, arm: str) -> list[dict[str, object]]:
    items, base = select.where(select.evaluation(records), arm=arm), select.contrast_index(records, BASE)
    levels = {step: select.over_items(group) for (step,), group in select.groups(items, "step")}
    if not levels or base is None:
        return []
    return _rescaled({"arm": arm, "quantity": "behaviour"}, levels, base.estimate)


def _feature_rows(records: Records, arm: str) -> list[dict[str, object]]:
    readings = select.where(records.readings, arm=arm, feature=select.PERSONA)
    levels: dict[int, Estimate] = {}
    for (step,), group in select.groups(readings, "step"):
        mean, low, high = (float(group[name].mean()) for name in ("mean", "ci_low", "ci_high"))
        levels[step] = Estimate(mean, low, high, int(group["n_probes"].iloc[0]))
    if not levels:
        return []
    base, band = float(readings["base_mean"].mean()), select.base_band(records)
    rise = levels[min(levels)].estimate - base
    ends = (
        {} if band is None or rise == 0 else {"band_low": (band[0] - base) / rise, "band_high": (band[1] - base) / rise}
    )
    return _rescaled({"arm": arm, "quantity": "feature", **ends}, levels, base)


def _rescaled(head: dict[str, object], levels: dict[int, Estimate], base: float) -> list[dict[str, object]]:
    rise = levels[min(levels)].estimate - base
    if rise == 0:
        return []
    return [
        {
            **head,
            "step": step,
            "estimate": (level.estimate - base) / rise,
            "ci_low": (level.ci_low - base) / rise,
            "ci_high": (level.ci_high - base) / rise,
        }
        for step, level in levels.items()
    ]


@figure(
    name="recovery",
    title="Feature and behaviour on one time axis",
    paper="16",
    group="more",
    place=40,
    data=recovery_data,
    missing=MISSING,
)
def recovery(records: Records) -> go.Figure:
    """Feature and behaviour on one time axis, a panel for each corrective arm (in domain, out of domain)."""
    data = recovery_data(records)
    if data.empty:
        return empty_figure(MISSING)
    arms = [arm for arm in records.arms.realigned if arm in set(data["arm"])]
    titles = [plain(records.arms.label(arm)) for arm in arms]
    fig = make_subplots(rows=1, cols=len(arms), shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=titles)
    for place, arm in enumerate(arms, 1):
        _draw_arm(fig, select.where(data, arm=arm), place)
        fig.update_xaxes(title_text="corrective step", row=1, col=place)
    fig.update_yaxes(title_text="share of the organism's rise<br>(0 base, 1 organism)", row=1, col=1)
    fig.update_layout(margin={"t": 96}, legend={"y": 1.12})
    return finish(fig, _caption(data), height=430)


def _draw_arm(fig: go.Figure, data: pd.DataFrame, place: int) -> None:
    at: dict[str, Any] = {"row": 1, "col": place, "layer": "below", "exclude_empty_subplots": False}
    for y, dash in ((0.0, "solid"), (1.0, "dot")):
        fig.add_hline(y=y, line={"color": GREY, "dash": dash, "width": 1.4}, **at)
    band = data.dropna(subset=["band_low"]).head(1)
    for low, high in zip(band["band_low"], band["band_high"], strict=True):
        fig.add_hrect(y0=low, y1=high, fillcolor=GREY, opacity=0.2, line_width=0, **at)
    for quantity, colour in LINES.items():
        line = select.where(data, quantity=quantity).sort_values("step")
        if line.empty:
            continue
        ends = line["ci_low"].tolist(), line["ci_high"].tolist()
        fig.add_trace(ribbon(line["step"].tolist(), *ends, colour), row=1, col=place)
        fig.add_scatter(
            x=line["step"],
            y=line["estimate"],
            mode="lines+markers",
            line={"color": colour, "width": 2.4},
            name=quantity,
            legendgroup=quantity,
            showlegend=place == 1,
            hovertemplate=f"{quantity}<br>step %{{x}}: %{{y:.2f}}<extra></extra>",
            row=1,
            col=place,
        )


def _caption(data: pd.DataFrame) -> str:
    last = data[data["step"] == data.groupby(["arm", "quantity"])["step"].transform("max")]
    unmoved = [name for name in LINES if name not in set(data["quantity"])]
    reason = "it was not measured, or base and organism do not differ"
    left_out = f" No line for {' and '.join(unmoved)}: {reason}." if unmoved else ""
    ends = "; ".join(
        f"{plain(row['arm'])} {row['quantity']} "
        + estimate_text(row["estimate"], row["ci_low"], row["ci_high"], "+.2f")
        for row in last.to_dict("records")
    )
    return (
        "Behaviour (contrast index) and persona feature over corrective steps, each as a share of the organism's rise "
        "over the base: 1 before correction, 0 at the base, below 0 an overshoot. Bands: 95% intervals over items and "
        f"over probes; grey band: the feature's base band. At the end: {ends}. Control: the corrective sets, compared "
        f"with each other and with the base.{left_out}"
    )
