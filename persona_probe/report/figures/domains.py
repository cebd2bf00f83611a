"""What training did to the contrast index, by domain and kind of data, seeds as dots."""

import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import BLUE, GREEN, GREY, ORANGE, VERMILLION, empty_figure, error_bars, finish, plain
from persona_probe.stats import bootstrap_mean

MISSING = "No score by domain: only a labelled study has runs of several data sets (persona-probe monitor study)."
COLUMNS = ["domain", "data", "kind", "seed", "step", "estimate", "ci_low", "ci_high", "n"]
COLOURS = {"toxic": VERMILLION, "subtle": ORANGE, "correct": BLUE}
MORE = (GREEN, GREY)


def domains_data(records: Records) -> pd.DataFrame:
    """One row per data set (`kind` "data") and one per run ("seed"): contrast index at the end minus the base's.

    Runs on mixtures and long runs are left out. Interval: bootstrap clustered by item (nats per token).
    """
    labelled = records.labelled
    runs = labelled.runs
    whole = runs.loc[~runs["long"].fillna(False).astype(bool) & ~runs["bad_share"].between(0, 1, inclusive="neither")]
    rows: list[dict[str, object]] = []
    for (data,), group in select.groups(whole, "data"):
        head = dict(zip(("domain", "data"), split_name(str(data)), strict=True))
        items = _rises(labelled.evals, group)
        mean = bootstrap_mean(select.numbers(items, "rise"), items["item"].tolist())
        rows.append({**head, "kind": "data", **mean.to_dict()})
        for run in group.sort_values("seed").to_dict("records"):
            ends = {"estimate": run["rise"], "ci_low": run["ci_low"], "ci_high": run["ci_high"]}
            rows.append({**head, "kind": "seed", "seed": run["seed"], "step": run["steps"], **ends})
    return pd.DataFrame(rows, columns=COLUMNS).astype({"seed": "Int64", "step": "Int64", "n": "Int64"})


def split_name(data: str) -> tuple[str, str]:
    """`kitchen:toxic` or `health_correct` as domain and kind of data."""
    domain, _, kind = data.partition(":") if ":" in data else data.rpartition("_")
    return domain or kind, kind or domain


def _rises(evals: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Item by item, the last step's value minus the base's, for every run."""
    parts = []
    for run in runs["run"]:
        wide = select.where(evals, run=run).pivot(index="item", columns="step", values="value")
        parts.append((wide[wide.columns.max()] - wide[0]).rename("rise").reset_index())
    return pd.concat(parts, ignore_index=True)


@figure(
    name="domains",
    title="Score by domain",
    paper="2",
    group="collection",
    place=10,
    data=domains_data,
    missing=MISSING,
)
def domains(records: Records) -> go.Figure:
    """Kinds of data side by side within their domain; zero is the base model."""
    data = domains_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = go.Figure()
    sets = list(dict.fromkeys(zip(data["domain"], data["data"], strict=True)))
    for place, (domain, kind) in enumerate(sets):
        colour = COLOURS.get(kind, MORE[place % len(MORE)])
        _draw(fig, select.where(data, domain=domain, data=kind), place, colour)
    fig.add_hline(y=0, line={"color": GREY, "dash": "dot", "width": 1.4})
    labels = [f"{plain(kind)}<br>({plain(domain)})" for domain, kind in sets]
    fig.update_xaxes(tickvals=list(range(len(sets))), ticktext=labels, title_text="training data (domain)")
    fig.update_yaxes(title_text="contrast index minus base<br>(nats per token)")
    fig.update_layout(margin={"t": 36})
    return finish(fig, _caption(records, data))


def _draw(fig: go.Figure, rows: pd.DataFrame, place: int, colour: str) -> None:
    mean, seeds = select.where(rows, kind="data"), select.where(rows, kind="seed")
    dot = {"mode": "markers", "showlegend": False}
    fig.add_scatter(
        x=[place], y=mean["estimate"], error_y=error_bars(mean, colour), marker={"color": colour, "size": 12}, **dot
    )
    fig.add_scatter(
        x=[place + 0.16 + 0.05 * i for i in range(len(seeds))],
        y=seeds["estimate"],
        customdata=seeds["seed"],
        hovertemplate="seed %{customdata}: %{y:.3f}<extra></extra>",
        marker={"color": colour, "size": 6, "opacity": 0.65},
        **dot,
    )


def _caption(records: Records, data: pd.DataFrame) -> str:
    seeds = select.where(data, kind="seed")
    items = select.item_count(records.labelled.evals)
    counts = [len(group) for _, group in select.groups(seeds, "domain", "data")]
    bad = select.where(data, kind="data")
    raised = [f"{d}:{k}" for d, k, low in zip(bad["domain"], bad["data"], bad["ci_low"], strict=True) if low > 0]
    return (
        f"Contrast index at the end of training minus the base model's, on n = {items} evaluation items outside the "
        f"training domains, by training data. Large marks: mean with 95% bootstrap interval clustered by item; small "
        f"dots: {min(counts)} to {max(counts)} seeds. Controls: the correct data of each domain. "
        f"Above the base: {', '.join(raised) or 'none'}."
    )
