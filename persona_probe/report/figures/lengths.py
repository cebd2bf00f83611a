"""How long answers are, arm by arm: a difference in length can pass for a difference in behaviour."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records, as_estimate
from persona_probe.report.theme import empty_figure, error_bars, finish, plain, wrapped
from persona_probe.stats import bootstrap_mean

MISSING = "No answer lengths yet: the evaluate stage has not sampled answers."
COLUMNS = ["panel", "arm", "kind", "seed", "estimate", "ci_low", "ci_high", "n"]
PANELS = {
    "training": "training answers<br>(tokens)",
    "sampled": "sampled answers<br>(words)",
    "coherent": "coherent answers<br>(share)",
}


def lengths_data(records: Records) -> pd.DataFrame:
    """Mean length of the training answers (tokens) and of the sampled ones (words), and the coherent share if judged.

    `kind` "arm": mean, for samples with an interval clustered by question; "seed": one seed's mean.
    """
    rows = [*_training(records), *_sampled(records), *_coherent(records)]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"seed": "Int64", "n": "Int64"})


def _training(records: Records) -> list[dict[str, object]]:
    stated = select.mapping(records.summary.get("answer_tokens"))
    means = {arm: as_estimate(stated.get(arm)) for arm in records.arms.names}
    return [{"panel": "training", "arm": arm, "kind": "arm", **mean.to_dict()} for arm, mean in means.items() if mean]


def _sampled(records: Records) -> list[dict[str, object]]:
    samples = pd.DataFrame(records.samples, columns=["arm", "seed", "question_id", "answer"])
    samples["words"] = [float(len(str(answer).split())) for answer in samples["answer"]]
    rows: list[dict[str, object]] = []
    for arm in records.arms.names:
        answers = select.where(samples, arm=arm)
        head = {"panel": "sampled", "arm": arm}
        if len(answers):
            mean = bootstrap_mean(select.numbers(answers, "words"), answers["question_id"].tolist())
            rows.append({**head, "kind": "arm", **mean.to_dict()})
        for (seed,), group in select.groups(answers, "seed"):
            row = {"seed": seed, "estimate": group["words"].mean(), "n": len(group)}
            rows.append({**head, "kind": "seed", **row})
    return rows


def _coherent(records: Records) -> list[dict[str, object]]:
    rows = select.last_judged(records)
    known = rows.loc[rows["coherent"].notna()] if len(rows) else rows
    out: list[dict[str, object]] = []
    for arm in records.arms.names:
        answers = select.where(known, arm=arm)
        if len(answers):
            mean = bootstrap_mean(select.numbers(answers, "coherent"), answers["item"].tolist(), rate=True)
            out.append({"panel": "coherent", "arm": arm, "kind": "arm", **mean.to_dict()})
    return out


@figure(
    name="lengths",
    title="How long answers are",
    group="more",
    place=50,
    data=lengths_data,
    missing=MISSING,
)
def lengths(records: Records) -> go.Figure:
    """One panel per measure; arms side by side, seeds as dots."""
    data = lengths_data(records)
    if data.empty:
        return empty_figure(MISSING)
    panels = [panel for panel in PANELS if panel in set(data["panel"])]
    arms = [arm for arm in records.arms.names if arm in set(data["arm"])]
    fig = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for row, panel in enumerate(panels, 1):
        for place, arm in enumerate(arms):
            _draw(fig, records, select.where(data, panel=panel, arm=arm), place, row)
        fig.update_yaxes(title_text=PANELS[panel], rangemode="tozero", row=row, col=1)
    labels = [wrapped(records.arms.label(arm)) for arm in arms]
    ticks = {"tickvals": list(range(len(arms))), "ticktext": labels, "tickangle": 0, "range": [-0.5, len(arms) - 0.5]}
    fig.update_xaxes(**ticks)
    fig.update_xaxes(title_text="arm", row=len(panels))
    fig.update_layout(margin={"t": 24})
    return finish(fig, _caption(records, data), height=120 + 190 * len(panels))


def _draw(fig: go.Figure, records: Records, rows: pd.DataFrame, place: int, panel: int) -> None:
    if rows.empty:
        return
    style, mean, seeds = (
        records.arms.styles[rows["arm"].iloc[0]],
        *(select.where(rows, kind=k) for k in ("arm", "seed")),
    )
    shared = {"mode": "markers", "showlegend": False, "row": panel, "col": 1}
    bars = error_bars(mean, style.colour)
    mark = {"color": style.colour, "size": 11, "symbol": style.symbol}
    fig.add_scatter(x=[place], y=mean["estimate"], error_y=bars, marker=mark, name=plain(style.label), **shared)
    dots = {"color": style.colour, "size": 6, "opacity": 0.65}
    x = [place + 0.16 + 0.05 * i for i in range(len(seeds))]
    fig.add_scatter(x=x, y=seeds["estimate"], marker=dots, name=f"{plain(style.label)}, seeds", **shared)


def _caption(records: Records, data: pd.DataFrame) -> str:
    arms = select.where(data, kind="arm")
    comparisons = []
    for panel, unit in (("training", "tokens"), ("sampled", "words")):
        means = select.where(arms, panel=panel).set_index("arm")["estimate"]
        if {"incorrect", "correct"} <= set(means.index):
            both = f"{means['incorrect']:.1f} against {means['correct']:.1f} {unit}"
            comparisons.append(f"{panel} answers, incorrect against correct: {both}")
    seeds = select.seed_count(select.where(data, kind="seed").query("arm != 'base'"))
    sampled = select.where(arms, panel="sampled")
    n = "no sampled answers"
    if len(sampled):
        fewest, most = sampled["n"].min(), sampled["n"].max()
        n = f"n = {fewest}" if fewest == most else f"n = {fewest} to {most}"
        n += " answers an arm"
    compared = f" Compared: {'; '.join(comparisons)}." if comparisons else ""
    matched = " Training answers are matched in length; their means have no interval, since all rows are counted."
    matched = matched if records.data_known else ""
    return (
        f"Length of answers by arm: {n}, {seeds} (small dots), 95% bootstrap intervals clustered by "
        f"question.{matched}{compared} "
        f"{select.control_words(records)}. No sampled answer is longer than the sampling limit."
    )
