"""Where rankers of latents agree: shared top latents and rank correlation, pair by pair."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import OPTIONAL, Records
from persona_probe.report.theme import empty_figure, finish, plain

MISSING = "No agreement of rankers yet: the locate stage has not run."


def ranker_agreement_data(records: Records) -> pd.DataFrame:
    """One row per pair of rankers: `share` of the top latents that both pick, chance, and Spearman's correlation."""
    return records.agreement[list(OPTIONAL["agreement"])].reset_index(drop=True)


@figure(
    name="ranker_agreement",
    title="Where rankers agree",
    group="more",
    place=30,
    data=ranker_agreement_data,
    missing=MISSING,
)
def ranker_agreement(records: Records) -> go.Figure:
    """Below the diagonal the shared share of the top, above it the rank correlation."""
    data = ranker_agreement_data(records)
    if data.empty:
        return empty_figure(MISSING)
    names = list(dict.fromkeys([*data["left"], *data["right"]]))
    grid = np.full((len(names), len(names)), np.nan)
    for pair in data.to_dict("records"):
        left, right = sorted((names.index(pair["left"]), names.index(pair["right"])))
        grid[right, left], grid[left, right] = pair["share"], pair["spearman"]
    labels = [plain(name).replace("_", " ") for name in names]
    fig = go.Figure()
    fig.add_heatmap(
        z=grid,
        x=labels,
        y=labels,
        zmin=-1 if np.nanmin(grid) < 0 else 0,
        zmax=1,
        colorscale="Cividis",
        texttemplate="%{z:.2f}",
        hoverongaps=False,
        hovertemplate="%{y}, %{x}: %{z:.2f}<extra></extra>",
        colorbar={"title": {"text": "agreement"}},
    )
    fig.update_yaxes(autorange="reversed", title_text="ranker", showgrid=False)
    fig.update_xaxes(title_text="ranker", showgrid=False)
    fig.update_layout(margin={"t": 36})
    return finish(fig, _caption(data), height=180 + 64 * len(names))


def _caption(data: pd.DataFrame) -> str:
    top, alive = max(select.distinct(data, "top")), max(select.distinct(data, "alive"))
    low, high = data["share"].min(), data["share"].max()
    spread = f"{data['spearman'].min():.2f} to {data['spearman'].max():.2f}"
    return (
        f"Below the diagonal: share of each ranker's top {top} latents that the other picks too ({low:.2f} to "
        f"{high:.2f}); above: Spearman's rank correlation over the n = {alive} latents that fire ({spread}). "
        f"Control: two random picks would share {data['chance'].max():.3f}. No interval: both are counts on one set of "
        "answers and one study."
    )
