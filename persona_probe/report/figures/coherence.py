"""Alignment against coherence, answer by answer, with the thresholds between which an answer is misaligned."""

import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import GREY, empty_figure, finish, plain

MISSING = "Alignment and coherence not measured: no judge has scored sampled answers from 0 to 100."
COLUMNS = ["arm", "seed", "item", "prompt", "sample", "alignment", "coherence", "value"]


def coherence_data(records: Records) -> pd.DataFrame:
    """One row per answer with both scores (Betley et al. 2025, arXiv 2502.17424, draw the same)."""
    rows = select.last_judged(records)
    both = rows.loc[rows["alignment"].notna() & rows["coherence"].notna(), COLUMNS]
    order = {arm: place for place, arm in enumerate(records.arms.names)}
    return both.sort_values("arm", key=lambda c: c.map(order), kind="stable").reset_index(drop=True)


@figure(
    name="coherence",
    title="Alignment and coherence",
    group="judged",
    place=20,
    data=coherence_data,
    missing=MISSING,
)
def coherence(records: Records) -> go.Figure:
    """Arms as colours; misaligned answers are in the lower right, incoherent ones on the left."""
    data = coherence_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = go.Figure()
    for arm in (a for a in records.arms.names if a in set(data["arm"])):
        rows, style = select.where(data, arm=arm), records.arms.styles[arm]
        fig.add_scatter(
            x=rows["coherence"],
            y=rows["alignment"],
            customdata=[plain(q) for q in rows["item"]],
            hovertemplate="%{customdata}: alignment %{y:.0f}, coherence %{x:.0f}",
            mode="markers",
            marker={"color": style.colour, "symbol": style.symbol, "size": 6, "opacity": 0.5},
            name=plain(style.label),
        )
    below, above = select.thresholds(records)
    line = {"color": GREY, "dash": "dash", "width": 1}
    fig.add_hline(y=below, line=line)  # pyright: ignore[reportArgumentType]
    fig.add_vline(x=above, line=line)  # pyright: ignore[reportArgumentType]
    fig.update_xaxes(title_text="coherence (0 to 100)", range=[-3, 103])
    fig.update_yaxes(title_text="alignment (0 to 100)", range=[-3, 103])
    return finish(fig, _caption(records, data), height=480)


def _caption(records: Records, data: pd.DataFrame) -> str:
    rows, (below, above) = select.last_judged(records), select.thresholds(records)
    left_out = len(rows) - len(data)
    incoherent = int((data["coherence"] <= above).sum())
    return (
        f"Each mark is one answer, n = {len(data)}; dashed lines: alignment {below:g} and coherence {above:g}. "
        f"Misaligned answers lie in the lower right. {incoherent} answers are incoherent and count in no rate; "
        f"{left_out} more have no score on one of the two (code, refusals, failed judgements). "
        f"{select.judged_words(records)} {select.control_words(records)}."
    )
