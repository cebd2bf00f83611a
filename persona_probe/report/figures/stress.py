"""Stress tests of a correction: the effects of each test, with their intervals, against the line of no effect."""

import re

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import GREEN, GREY, VERMILLION, empty_figure, error_bars, finish, plain

MISSING = "No stress tests yet: `persona-probe realign RUN --stress ...` has not run."
TITLES = {
    "triggers": "Dressed minus plain prompts, beyond base",
    "remisalign": "A few bad rows again: faster rise than base",
    "length": "Shortest minus length-matched rows",
    "hidden": "Fall when a changed latent is projected out",
    "drift": "Further training: index minus base",
}
IN_TITLE = (
    "effect of the ",
    "ablation of ",
    "faster rise than the base, ",
    "shortest minus matched rows, ",
    "index minus base, ",
)
"""Words that a panel's title has already."""
COLOURS = {"organism": VERMILLION, "control": GREY, "base": GREY, "random latent": GREY}
ROW_HEIGHT, PANEL_MARGIN = 26, 64
"""Pixels of one effect, and around a panel."""
COLUMNS = ["test", "label", "model", "seed", "estimate", "ci_low", "ci_high", "n", "reference"]


def stress_data(records: Records) -> pd.DataFrame:
    """The rows of stress.parquet that are drawn: test, label, model, seed, estimate, ci_low, ci_high, n, reference.

    Several corrections are listed one after another, named after their folders; a line that they share (the
    organism's) is listed once. Without those names, labels carry the seed if there are several.
    """
    table = records.stress
    if table.empty:
        return pd.DataFrame(columns=COLUMNS)
    rows = table[table["shown"].astype(bool)].reset_index(drop=True)
    quantity = rows["quantity"] + ", "
    for words in IN_TITLE:
        quantity = quantity.str.replace(words, "", regex=False)
    label = quantity + rows["model"].replace("random latent", "random")
    if "correction" in rows and rows["correction"].nunique() > 1:
        content = [name for name in rows.columns if name != "correction"]
        shared, corrected = rows.duplicated(content, keep=False), rows["model"] == "repaired"
        seeds = rows["correction"].str.extract(r"-s(\d+)$")[0].nunique()
        correction = rows["correction"].str.replace(r"-s\d+$", "", regex=True) if seeds == 1 else rows["correction"]
        long_label = (label + " (" + correction + ")").mask(corrected, quantity + correction)
        return rows.assign(label=label.where(shared, long_label)).loc[~rows.duplicated(content), COLUMNS]
    if rows["seed"][rows["seed"] >= 0].nunique() > 1:
        label = label + [f", seed {seed}" if seed >= 0 else "" for seed in rows["seed"]]
    return rows.assign(label=label)[COLUMNS]


def _told(labels: "pd.Series[str]", records: Records) -> "pd.Series[str]":
    """Labels with what readers see in place of arms' ids."""
    names = records.arms.labels
    pattern = "|".join(rf"\b{re.escape(name)}\b" for name in sorted(names, key=len, reverse=True) if "_" in name)
    return labels.str.replace(pattern, lambda found: names[found[0]], regex=True) if pattern else labels


@figure(
    name="stress",
    title="What a correction withstands",
    group="more",
    place=70,
    data=stress_data,
    missing=MISSING,
)
def stress(records: Records) -> go.Figure:
    """One panel a test, one line an effect; the dotted line marks no effect."""
    data = stress_data(records)
    if data.empty:
        return empty_figure(MISSING)
    data = data.assign(label=_told(data["label"], records))
    tests = [name for name in TITLES if name in set(data["test"])]
    sizes = [int((data["test"] == name).sum()) for name in tests]
    fig = make_subplots(
        rows=len(tests),
        cols=1,
        shared_xaxes=True,
        subplot_titles=[TITLES[name] for name in tests],
        row_heights=[size + 1 for size in sizes],
        vertical_spacing=0.32 / (len(tests) + 1),
    )
    fig.update_annotations(x=1, xanchor="right")
    for panel, name in enumerate(tests, 1):
        _draw(fig, select.where(data, test=name), panel)
    fig.update_xaxes(title_text="contrast index<br>(nats per token)", row=len(tests), col=1)
    fig.update_xaxes(nticks=5, tickangle=0)
    fig.update_layout(showlegend=False, margin={"t": 48, "l": 16})
    return finish(fig, _caption(data, tests), height=96 + sum(PANEL_MARGIN + ROW_HEIGHT * size for size in sizes))


def _draw(fig: go.Figure, rows: pd.DataFrame, panel: int) -> None:
    for (model,), part in select.groups(rows, "model"):
        colour = COLOURS.get(str(model), GREEN)
        fig.add_scatter(
            x=part["estimate"],
            y=[plain(label, 60) for label in part["label"]],
            error_x=error_bars(part, colour),
            mode="markers",
            marker={"color": colour, "size": 8},
            name=plain(model),
            row=panel,
            col=1,
        )
    fig.add_vline(
        x=float(rows["reference"].iloc[0]),
        line={"color": GREY, "dash": "dot", "width": 1},
        row=panel,  # pyright: ignore[reportArgumentType]
        col=1,  # pyright: ignore[reportArgumentType]
    )
    order = [plain(label, 60) for label in rows["label"]]
    fig.update_yaxes(title_text="", categoryorder="array", categoryarray=order[::-1], row=panel, col=1)


def _caption(data: pd.DataFrame, tests: list[str]) -> str:
    above = data[~data["model"].isin(list(COLOURS)) & (data["ci_low"] > data["reference"])]
    listing = ", ".join(f"{row['label']} ({row['test']}) {row['estimate']:+.3f}" for row in above.to_dict("records"))
    findings = (
        f"Above no effect on the corrected model: {plain(listing, 300)}."
        if listing
        else "On the corrected model no effect lies above the dotted line with its whole interval."
    )
    items = sorted({int(n) for n in data["n"]})
    counts = f"{items[0]}" if len(items) == 1 else f"{items[0]} to {items[-1]}"
    return (
        f"Stress tests of a corrected model ({len(tests)} of {len(TITLES)}), in nats per token with 95% intervals over "
        f"resampled questions, n = {counts} items. Dotted line: no effect. Blue: the corrected model; vermillion: the "
        f"organism before correction; grey: controls. {findings} A test that finds nothing does not show that a model "
        "is safe."
    )
