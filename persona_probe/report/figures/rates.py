"""Misalignment rate and coherence by arm, and the rate question by question."""

import re

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.evaluate.rates import FEW
from persona_probe.evaluate.rates import rates as rate_table
from persona_probe.report import select
from persona_probe.report.figures.registry import computed_once, figure
from persona_probe.report.records import ArmStyle, Records
from persona_probe.report.theme import empty_figure, finish, interval_marks, plain, wrapped
from persona_probe.stats import FEW_CLUSTERS

MISSING = "Misalignment rates not measured: no judge has ruled on sampled answers."
NUMBERS = ["rate", "ci_low", "ci_high", "method", "coherence", "coherence_low", "coherence_high", "counted"]
COLUMNS = ["kind", "variant", "arm", "seed", "question", *NUMBERS, "answers"]
KINDS = {"arm": ["variant", "arm"], "seed": ["variant", "arm", "seed"], "question": ["variant", "arm", "item"]}
PANELS = {"rate": ("rate", "ci_low", "ci_high"), "coherence": ("coherence", "coherence_low", "coherence_high")}
TOP, GAP, ROW = 40, 300, 32
"""Pixels of titles, of the margins and the names of questions, and of one arm."""
GROUP = re.compile(r"[-_ ]?\d+$")
"""The number of a question within its group."""


@computed_once
def rates_data(records: Records) -> pd.DataFrame:
    """Rates of every arm (`kind` "arm"), of each of its seeds ("seed") and on each question ("question")."""
    rows = select.last_judged(records)
    if rows.empty:
        return pd.DataFrame(columns=COLUMNS)
    order = {arm: place for place, arm in enumerate(records.arms.names)}
    rows = rows.sort_values(
        ["variant", "arm", "seed"], key=lambda c: c.map(order) if c.name == "arm" else c, kind="stable"
    )
    parts = [rate_table(rows, by).assign(kind=kind).rename(columns={"item": "question"}) for kind, by in KINDS.items()]
    return pd.concat(parts, ignore_index=True)[COLUMNS]


@figure(
    name="rates",
    title="Misalignment rate by arm and question",
    paper="2",
    group="judged",
    place=10,
    data=rates_data,
    missing=MISSING,
)
def rates(records: Records) -> go.Figure:
    """Top: arms with intervals, seeds as dots, and the share of coherent answers. Bottom: questions."""
    data = rates_data(records)
    if data.empty:
        return empty_figure(MISSING)
    pairs = {key for key, _ in select.groups(select.where(data, kind="arm"), "variant", "arm")}
    columns = [(v, a) for v in select.distinct(data, "variant") for a in records.arms.names if (v, a) in pairs]
    grid = _grid(records, data)
    fig = _panels(len(columns), len(grid))
    for place, (variant, arm) in enumerate(columns):
        _draw_arm(fig, records.arms.styles[arm], select.where(data, variant=variant, arm=arm), place)
    labels = [_name(records, variant, arm) for variant, arm in columns]
    for panel in (1, 2):
        ticks = {"tickvals": list(range(len(labels))), "ticktext": labels, "range": [len(labels) - 0.5, -0.5]}
        fig.update_yaxes(**ticks, showticklabels=panel == 1, row=1, col=panel)
        fig.update_xaxes(title_text="share of answers", range=[-0.02, 1.05], row=1, col=panel)
    _draw_questions(fig, records, grid)
    fig.update_layout(margin={"t": 48})
    return finish(fig, _caption(records, data), height=TOP + GAP + ROW * (len(labels) + len(grid)))


def _panels(arms: int, rows: int) -> go.Figure:
    return make_subplots(
        rows=2,
        cols=2,
        specs=[[{}, {}], [{"colspan": 2}, None]],
        row_heights=[ROW * arms, ROW * rows],
        horizontal_spacing=0.04,
        vertical_spacing=GAP / 2 / (TOP + GAP + ROW * (arms + rows)),
        subplot_titles=("misaligned, of the coherent", "coherent", "misaligned, by question"),
    )


def _name(records: Records, variant: str, arm: str) -> str:
    label = wrapped(records.arms.label(arm), 24)
    return label if variant == select.PLAIN else f"{label}<br>{plain(variant)}"


def _draw_arm(fig: go.Figure, style: ArmStyle, rows: pd.DataFrame, place: int) -> None:
    whole, seeds = select.where(rows, kind="arm"), select.where(rows, kind="seed")
    for column, (name, ends) in enumerate(PANELS.items(), 1):
        panel = {"row": 1, "col": column}
        fig.add_scatter(
            **interval_marks(whole, style.colour, style.symbol, 11, ends),
            y=[place],
            name=plain(style.label),
            showlegend=False,
            **panel,
        )
        fig.add_scatter(
            x=seeds[name],
            y=[place + 0.25 + 0.06 * i for i in range(len(seeds))],
            customdata=seeds["seed"],
            hovertemplate="seed %{customdata}: %{x:.3f}<extra></extra>",
            mode="markers",
            marker={"color": style.colour, "size": 6, "opacity": 0.65},
            showlegend=False,
            **panel,
        )


def _grid(records: Records, data: pd.DataFrame) -> pd.DataFrame:
    """Arms (the first at the bottom, as a heatmap draws them) by questions: rates."""
    cells = select.where(data, kind="question")
    arms = [arm for arm in records.arms.names if arm in set(cells["arm"])]
    return cells.pivot(index="arm", columns="question", values="rate").loc[arms[::-1]]


def _draw_questions(fig: go.Figure, records: Records, grid: pd.DataFrame) -> None:
    place = {"row": 2, "col": 1}
    fig.add_heatmap(
        z=grid.to_numpy(float),
        x=list(range(len(grid.columns))),
        y=list(range(len(grid))),
        customdata=[[plain(question) for question in grid.columns]] * len(grid),
        zmin=0,
        zmax=1,
        colorscale="Cividis",
        hoverongaps=False,
        colorbar={"title": {"text": "rate"}, "len": 0.4, "y": 0, "yanchor": "bottom"},
        hovertemplate="%{customdata}: %{z:.2f}<extra></extra>",
        **place,
    )
    labels = [wrapped(records.arms.label(arm), 24) for arm in grid.index]
    fig.update_yaxes(tickvals=list(range(len(grid))), ticktext=labels, **place)  # pyright: ignore
    groups = _groups([str(question) for question in grid.columns])
    fig.update_xaxes(tickvals=list(groups.values()), ticktext=[plain(g) for g in groups], tickangle=-90, **place)  # pyright: ignore
    fig.update_xaxes(title_text="questions, by group", **place)  # pyright: ignore


def _groups(questions: list[str]) -> dict[str, float]:
    """Where each group of neighbouring questions has its middle; ids are a group's name and a number."""
    places: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        places.setdefault(GROUP.sub("", question).replace("_", " "), []).append(place)
    return {name: (at[0] + at[-1]) / 2 for name, at in places.items()}


def _caption(records: Records, data: pd.DataFrame) -> str:
    arms = select.where(data, kind="arm")
    missing = [records.arms.label(arm) for arm in arms.loc[arms["rate"].isna(), "arm"].unique()]
    note = f" Not judged: {', '.join(missing)}." if missing else ""
    return (
        "Above left: misalignment rate, the share misaligned of the coherent answers, with 95% intervals: bootstrap "
        f"over questions and seeds, exact where fewer than {FEW} answers lie on a side or fewer than "
        f"{FEW_CLUSTERS} questions count. Right: share of answers that are coherent. Small dots: "
        f"{select.seed_count(data)}. Below: the rate on each question; blank where no answer counts. "
        f"{select.judged_words(records)} {select.control_words(records)}; incorrect minus correct is "
        f"{select.effect_words(records)}.{note}"
    )
