"""Causal effects of the top candidate latents, compared with those of random latents."""

import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records, as_estimate
from persona_probe.report.theme import CANDIDATE, FEATURE, GREY, empty_figure, error_bars, finish, plain

MISSING = "No causal effects of latents yet: the locate stage has not run."
TOP = 12
RANDOM_ROW = "random latents"
COLUMNS = [
    "latent",
    "label",
    "kind",
    "persona",
    "rank",
    "effect_base",
    "effect_base_low",
    "effect_base_high",
    "strength",
]


def latents_data(records: Records) -> pd.DataFrame:
    """The best tested candidates by causal effect on the base model, then every tested random latent."""
    latents = records.latents.loc[records.latents["effect_base"].notna(), COLUMNS]
    candidates = select.where(latents, kind="candidate").sort_values("effect_base", ascending=False).head(TOP)
    parts = [part for part in (candidates, select.where(latents, kind="random")) if not part.empty]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)


def _limit(records: Records) -> tuple[float, str]:
    """What the persona latent is held against (nats per token), and what that is; NaN without random latents.

    What the best of as many random latents as there were candidates stays below in 95 of 100 draws; of runs of 0.1.0
    the random latents' 95th percentile.
    """
    test = select.mapping(select.mapping(records.summary.get("causal_test")).get("base"))
    if isinstance(limit := test.get("limit"), float):
        return limit, f"what the best of {test.get('best_of')} random latents stays below in 95 of 100 draws"
    if (stated := as_estimate(records.summary.get("random_latent_p95"))) is not None:
        return stated.estimate, "their 95th percentile"
    effects = select.numbers(select.where(latents_data(records), kind="random"), "effect_base")
    return (float(np.quantile(effects, 0.95)) if effects.size else math.nan), "their 95th percentile"


@figure(
    name="latents",
    title="Causal effect of the top latents",
    paper="9",
    group="study",
    place=50,
    data=latents_data,
    missing=MISSING,
)
def latents(records: Records) -> go.Figure:
    """Candidates from the top down, random latents in one row, and what the best of them reach as a line."""
    data = latents_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = go.Figure()
    candidates = select.where(data, kind="candidate")
    persona = select.flags(candidates, "persona")
    for mask, colour, name in ((persona, FEATURE, "persona latent"), (~persona, CANDIDATE, "other candidates")):
        _draw_candidates(fig, candidates.loc[mask], colour, name)
    random = select.where(data, kind="random")
    style = {"color": GREY, "size": 9, "opacity": 0.6, "symbol": "line-ns-open"}
    fig.add_scatter(
        x=random["effect_base"], y=[RANDOM_ROW] * len(random), mode="markers", marker=style, name=RANDOM_ROW
    )
    if not math.isnan(line := _limit(records)[0]):
        fig.add_vline(x=line, line={"color": GREY, "dash": "dash", "width": 1.4})
    rows = [*_row_names(candidates), *([RANDOM_ROW] if len(random) else [])]
    fig.update_yaxes(categoryorder="array", categoryarray=rows[::-1], title_text="latent")
    fig.update_xaxes(title_text="causal effect on contrast index<br>(nats per token)")
    return finish(fig, _caption(records, data), height=200 + 32 * len(rows))


def _row_names(rows: pd.DataFrame) -> list[str]:
    pairs = zip(rows["latent"], rows["label"].fillna(""), strict=True)
    return [f"{latent} {plain(label, 22)}".strip() for latent, label in pairs]


def _draw_candidates(fig: go.Figure, rows: pd.DataFrame, colour: str, name: str) -> None:
    if rows.empty:
        return
    fig.add_scatter(
        x=rows["effect_base"],
        y=_row_names(rows),
        error_x=error_bars(rows, colour, ("effect_base", "effect_base_low", "effect_base_high")),
        mode="markers",
        marker={"color": colour, "size": 9},
        name=name,
    )


def _caption(records: Records, data: pd.DataFrame) -> str:
    counts = data["kind"].value_counts()
    strengths = ", ".join(f"{s:g}" for s in select.distinct(data, "strength"))
    limit, what = _limit(records)
    return (
        f"Causal effect on the base model's contrast index (odd part of steering at strength ±{strengths or '?'}) of "
        f"the top n = {counts.get('candidate', 0)} tested candidates, with 95% intervals over evaluation items. "
        f"Control: n = {counts.get('random', 0)} random latents, spread over firing rates, of the same norm "
        f"(grey ticks); dashed line: {what}, {limit:.3g}. A candidate left of that line does no more than a random "
        "latent."
    )
