"""Contrast index by category of question."""

import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import empty_figure, finish, interval_marks, plain

MISSING = "No contrast index by category yet: the induce stage has not run."
COLUMNS = ["category", "arm", "estimate", "ci_low", "ci_high", "n"]


def categories_data(records: Records) -> pd.DataFrame:
    """One row per category and arm at the arm's last step (nats per token); interval clustered by item."""
    final = select.last_step(select.evaluation(records))
    rows = [
        {"category": category, "arm": arm, **select.over_items(group).to_dict()}
        for (category, arm), group in select.groups(final, "category", "arm")
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["arm"] = pd.Categorical(table["arm"], categories=list(records.arms.names), ordered=True)
    return table.sort_values(["category", "arm"]).astype({"arm": str}).reset_index(drop=True)


@figure(
    name="categories",
    title="Contrast index by category",
    paper="13",
    group="study",
    place=60,
    data=categories_data,
    missing=MISSING,
)
def categories(records: Records) -> go.Figure:
    """Dots with intervals, one line of dots per arm within each category."""
    data = categories_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = go.Figure()
    names = sorted(set(data["category"]), reverse=True)
    arms = [arm for arm in records.arms.names if arm in set(data["arm"])]
    for i, arm in enumerate(arms):
        rows, style = select.where(data, arm=arm), records.arms.styles[arm]
        shift = 0.32 - 0.64 * i / max(len(arms) - 1, 1)
        fig.add_scatter(
            **interval_marks(rows, style.colour, style.symbol, 7),
            y=[names.index(c) + shift for c in rows["category"]],
            name=plain(style.label),
            customdata=rows["n"],
            hovertemplate="%{x:.3f} (n = %{customdata})",
        )
    fig.update_yaxes(tickvals=list(range(len(names))), ticktext=[plain(n).replace("_", " ") for n in names])
    fig.update_yaxes(range=[-0.6, len(names) - 0.4], title_text="category")
    fig.update_xaxes(title_text="contrast index (nats per token)")
    return finish(fig, _caption(records), height=170 + max(76, 15 * len(arms)) * len(names))


def _caption(records: Records) -> str:
    final = select.last_step(select.evaluation(records))
    items = [select.item_count(group) for _, group in select.groups(final, "category")]
    spread = f"{min(items)}" if min(items) == max(items) else f"{min(items)} to {max(items)}"
    return (
        f"Contrast index by category at each arm's last step: {len(items)} categories of n = {spread} evaluation "
        f"items, with 95% bootstrap intervals clustered by item. {select.control_words(records)}. An effect that "
        "spreads over categories far from the training domain is what makes the misalignment emergent."
    )
