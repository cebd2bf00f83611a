"""What each ranker finds of known plants: recall against the plant's size."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import GREY, PALETTE, empty_figure, finish, plain
from persona_probe.stats import exact_share

MISSING = "No planted truth: persona-probe bench planted has not written its table here."
COLUMNS = ["kind", "size", "ranker", "estimate", "ci_low", "ci_high", "found", "n", "false_share"]
LOOKS = (*zip(PALETTE, ("circle", "square", "diamond", "triangle-up", "cross", "x"), strict=True),)
CHANCE = "discrimination"
"""The ranker that sees the base alone, and so no plant: the chance line."""
CHANCE_LINE = {"color": GREY, "dash": "dot"}
NAMES = {
    "latent": "one frequent latent",
    "rare latent": "one rare latent",
    "latents": "five latents, random signs",
    "lora": "rank-1 LoRA onto a latent",
}
PANEL = 210
"""Pixels of a row of panels."""


def planted_truth_data(records: Records) -> pd.DataFrame:
    """One row per kind of plant, size and ranker: share of plants whose first latent is a planted one.

    Exact intervals (Clopper and Pearson). Where nothing was planted, `estimate` is missing and `false_share` tells.
    """
    rows = []
    for (kind, size, ranker), group in select.groups(records.planted, "kind", "size", "ranker"):
        head = {"kind": kind, "size": size, "ranker": ranker, "n": group["plant"].nunique()}
        head["false_share"] = group["false_share"].mean()
        known = group["recall_1"].dropna()
        if len(known):
            hits = int((known > 0).sum())
            rate = exact_share(hits, len(known))
            head |= {"estimate": rate.rate, "ci_low": rate.low, "ci_high": rate.high, "found": hits}
        rows.append(head)
    return pd.DataFrame(rows, columns=COLUMNS).astype({"found": "Int64", "n": "Int64"})


@figure(
    name="planted_truth",
    title="How well rankers find known plants",
    group="collection",
    place=60,
    data=planted_truth_data,
    missing=MISSING,
)
def planted_truth(records: Records) -> go.Figure:
    """One panel per kind of plant; a line per ranker."""
    data = planted_truth_data(records)
    planted = data.loc[data["estimate"].notna()]
    if planted.empty:
        return empty_figure(MISSING)
    kinds, rankers = select.distinct(planted, "kind"), list(dict.fromkeys(records.planted["ranker"]))
    rows = (len(kinds) + 1) // 2
    fig = make_subplots(
        rows=rows,
        cols=2,
        subplot_titles=[plain(NAMES.get(k, k)) for k in kinds],
        shared_yaxes=True,
        vertical_spacing=0.32 / rows,
    )
    for place, kind in enumerate(kinds):
        at: dict[str, Any] = {"row": place // 2 + 1, "col": place % 2 + 1}
        for ranker, (colour, symbol) in zip(rankers, LOOKS, strict=False):
            line = select.where(planted, kind=kind, ranker=ranker)
            fig.add_scatter(
                x=line["size"],
                y=line["estimate"],
                mode="lines+markers",
                line=CHANCE_LINE if ranker == CHANCE else {"color": colour},
                marker={"symbol": symbol, "size": 7},
                name=plain(ranker).replace("_", " "),
                legendgroup=ranker,
                showlegend=place == 0,
                **at,
            )
        fig.update_xaxes(type="log", tickvals=select.distinct(planted, "size"), **at)
        fig.update_yaxes(title_text="found first (share)" if place % 2 == 0 else "", range=[-0.04, 1.04], **at)
    fig.update_xaxes(title_text="size of the plant<br>(residual SD)", row=rows)
    fig.update_layout(margin={"t": 92}, legend={"y": 1.07 if rows > 1 else 1.14})
    return finish(fig, _caption(records, data), height=150 + PANEL * rows)


def _caption(records: Records, data: pd.DataFrame) -> str:
    nothing = select.where(records.planted, kind="nothing").drop_duplicates("plant")
    none = ""
    if len(nothing):
        with_false = int((nothing["false_share"] > 0).sum())
        rate = exact_share(with_false, len(nothing))
        none = (
            f" Control: with nothing planted, {with_false} of {len(nothing)} plants give any false discovery at "
            f"q = 0.05 (95% interval {rate.low:.1%} to {rate.high:.1%})."
        )
    planted = data.loc[data["estimate"].notna()]
    widest = (planted["ci_high"] - planted["ci_low"]).max() / 2
    chance = " Dotted: discrimination, which cannot see a plant." if CHANCE in set(data["ranker"]) else ""
    plants = records.planted["plant"].nunique()
    return (
        "Share of plants whose best-ranked latent is a planted one, against the plant's size in residual standard "
        f"deviations (SD): {plants} plants in all, n = {planted['n'].min()} to {planted['n'].max()} a point; exact 95% "
        f"intervals (listed in the CSV) are at most ±{widest:.2f} wide.{none}{chance}"
    )
