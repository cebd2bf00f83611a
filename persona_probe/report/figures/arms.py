"""Contrast index of every arm at its last step."""

import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import ArmStyle, Records, as_estimate
from persona_probe.report.theme import empty_figure, finish, interval_marks, interval_text, plain, wrapped

MISSING = "No contrast index yet: the induce stage has not run."
COLUMNS = ["arm", "kind", "seed", "step", "estimate", "ci_low", "ci_high", "n"]


def arms_data(records: Records) -> pd.DataFrame:
    """One row per arm (`kind` "arm": mean with interval) and one per arm and seed (`kind` "seed"); nats per token."""
    rows: list[dict[str, object]] = []
    final = select.last_step(select.evaluation(records))
    for arm in records.arms.names:
        if (mean := select.contrast_index(records, arm)) is not None:
            rows.append({"arm": arm, "kind": "arm", **mean.to_dict()})
        for (seed, step), group in select.groups(select.where(final, arm=arm), "seed", "step"):
            row = {"seed": seed, "step": step, "estimate": select.numbers(group, "value").mean(), "n": len(group)}
            rows.append({"arm": arm, "kind": "seed", **row})
    return pd.DataFrame(rows, columns=COLUMNS)


@figure(
    name="arms",
    title="Contrast index by arm",
    paper="2",
    group="study",
    place=10,
    data=arms_data,
    missing=MISSING,
)
def arms(records: Records) -> go.Figure:
    """Arms one below the other: interval, and seeds as dots."""
    data = arms_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = go.Figure()
    styles = {arm: records.arms.styles[arm] for arm in data["arm"].unique()}
    for place, (arm, style) in enumerate(styles.items()):
        _draw_arm(fig, select.where(data, arm=arm), style, place)
    labels = [wrapped(s.label, 24) for s in styles.values()]
    ends = [len(styles) - 0.5, -0.5]
    fig.update_yaxes(tickvals=list(range(len(styles))), ticktext=labels, range=ends, title_text="arm")
    fig.update_xaxes(title_text="how likely misaligned answers are<br>(contrast index, nats per token)")
    fig.update_layout(margin={"t": 16})
    return finish(fig, _caption(records, data), height=110 + 46 * len(styles))


def _draw_arm(fig: go.Figure, rows: pd.DataFrame, style: ArmStyle, place: int) -> None:
    colour, label = style.colour, plain(style.label)
    mean, seeds = select.where(rows, kind="arm"), select.where(rows, kind="seed")
    fig.add_scatter(
        **interval_marks(mean, colour, style.symbol, 12),
        y=[place] * len(mean),
        name=label,
        showlegend=False,
    )
    fig.add_scatter(
        x=seeds["estimate"],
        y=[place + 0.2 + 0.06 * i for i in range(len(seeds))],
        customdata=seeds["seed"],
        hovertemplate="seed %{customdata}: %{x:.3f}<extra></extra>",
        mode="markers",
        marker={"color": colour, "size": 6, "opacity": 0.65},
        name=f"{label}, seeds",
        showlegend=False,
    )


def _caption(records: Records, data: pd.DataFrame) -> str:
    items = select.item_count(select.evaluation(records)) or max(select.distinct(data, "n"))
    effect = interval_text(as_estimate(records.summary.get("effect_incorrect_minus_correct")))
    seeds = select.seed_count(select.where(data, kind="seed").query("arm != 'base'"))
    return (
        "Contrast index at each arm's last step: mean log-probability of the misaligned answer minus the aligned one, "
        f"on n = {items} evaluation items{select.outside(records)}; higher is more misaligned. Large marks: mean "
        f"with 95% bootstrap interval clustered by item; small dots: {seeds}. {select.control_words(records)}; "
        f"incorrect minus correct is {effect} nats per token."
    )
