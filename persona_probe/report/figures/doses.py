"""How many corrective rows are enough: behaviour and feature by number of rows, data set and way to choose rows."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.labels import DATA
from persona_probe.report.records import Records
from persona_probe.report.theme import GREEN, GREY, PALETTE, PURPLE, empty_figure, error_bars, finish, plain

MISSING = "No doses yet: run `persona-probe realign RUN --plan finetune_configs/realign-doses.yaml`."
COLOURS = {"kitchen_correct_holdout": GREEN, "health_correct": PURPLE}
"""Data as the re-aligned arms show them; other data have a colour of `PALETTE`."""
SYMBOLS = {"random": "circle", "projection_gap": "diamond", "perplexity_gap": "square", "diversity": "triangle-up"}
METHODS = {"continued": "", "fresh": "-open", "full": "-open-dot"}
PANELS = {
    "index_minus_base": "contrast index minus base<br>(nats per token)",
    "feature": "persona feature",
    "explained_variance": "SAE's explained<br>variance",
}
INTERVALS = {name: (name, f"{name}_ci_low", f"{name}_ci_high") for name in ("index_minus_base", "feature")}
BROKEN = 1.5
"""A model is called broken if its neutral perplexity exceeds the base's by this factor, as for mitigations."""
ASIDE = 1.055
"""Marks of other choices and methods are shifted right of their number of rows, each by this factor more."""
KEYS = ["data", "method", "choose_by", "rows", "seed"]
COLUMNS = [
    *KEYS,
    *(column for columns in INTERVALS.values() for column in columns),
    *("start_minus_base", "band_low", "band_high", "in_band", "behaviour_back"),
    *("explained_variance", "base_explained_variance", "perplexity_ratio"),
]


def doses_data(records: Records) -> pd.DataFrame:
    """The cells of `realign/doses.parquet` that were trained to their end, in order: the columns that are drawn."""
    table = records.doses
    if table.empty or "index_minus_base" not in table:
        return pd.DataFrame(columns=COLUMNS)
    rows = table.loc[~select.flags(table, "diverged") & table["index_minus_base"].notna()]
    return rows[COLUMNS].sort_values(KEYS).reset_index(drop=True)


@figure(
    name="doses",
    title="How many corrective rows are enough",
    group="more",
    place=60,
    data=doses_data,
    missing=MISSING,
)
def doses(records: Records) -> go.Figure:
    """A line a data set (random rows, the organism's own adapter trained further), and a mark for every other cell."""
    data = doses_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.4, 0.36, 0.24])
    _draw_references(fig, data)
    kinds = sorted(set(data[["choose_by", "method"]].itertuples(index=False, name=None)), key=_order)
    for colour, name in zip(_colours(data), select.distinct(data, "data"), strict=True):
        for panel, column in enumerate(PANELS, 1):
            _draw_set(fig, select.where(data, data=name), name, column, colour, panel, kinds)
    for choice, method in kinds:
        _legend_mark(fig, choice, method)
    for panel, title in enumerate(PANELS.values(), 1):
        fig.update_yaxes(title_text=title, row=panel, col=1)
    rows = select.distinct(data, "rows")
    fig.update_xaxes(type="log", tickvals=rows, ticktext=_tick_labels(rows))
    fig.update_xaxes(title_text="corrective rows", row=3, col=1)
    fig.update_layout(margin={"t": 90})
    return finish(fig, _caption(data), height=780)


def _tick_labels(rows: Sequence[float]) -> list[str]:
    """Doses too close for two labels: only the first gets one."""
    labels: list[str] = []
    last = 0.0
    for n in rows:
        labels.append(f"{n:g}" if n >= 1.3 * last else "")
        last = n if labels[-1] else last
    return labels


def _order(kind: tuple[str, str]) -> tuple[int, int, str]:
    """Random rows on the organism's own adapter first, then other choices, then other methods."""
    choice, method = kind
    return method != "continued", [*SYMBOLS, choice].index(choice), method


def _colours(data: pd.DataFrame) -> list[str]:
    names = select.distinct(data, "data")
    others = [name for name in names if name not in COLOURS]
    return [COLOURS.get(name) or PALETTE[(others.index(name) + 2) % len(PALETTE)] for name in names]


def _draw_references(fig: go.Figure, data: pd.DataFrame) -> None:
    above: dict[str, Any] = {"row": 1, "col": 1, "layer": "below", "exclude_empty_subplots": False}
    for y, dash in ((0.0, "solid"), (float(data["start_minus_base"].mean()), "dot")):
        fig.add_hline(y=y, line={"color": GREY, "dash": dash, "width": 1.4}, **above)
    low, high = data["band_low"].mean(), data["band_high"].mean()
    fig.add_hrect(y0=low, y1=high, fillcolor=GREY, opacity=0.2, line_width=0, **{**above, "row": 2})
    fitted = float(data["base_explained_variance"].mean())
    fig.add_hline(y=fitted, line={"color": GREY, "width": 1.4}, **{**above, "row": 3})


def _draw_set(
    fig: go.Figure,
    rows: pd.DataFrame,
    name: str,
    column: str,
    colour: str,
    panel: int,
    kinds: Sequence[tuple[str, str]],
) -> None:
    plainly = (rows["choose_by"] == "random") & (rows["method"] == "continued")
    line = rows.loc[plainly].groupby("rows")[column].mean()
    label = plain(" and ".join(DATA.get(part, part) for part in name.split("+")))
    if not line.empty:
        fig.add_scatter(
            x=line.index,
            y=line,
            mode="lines",
            line={"color": colour, "width": 2.2},
            name=label,
            legendgroup=label,
            showlegend=panel == 1,
            hoverinfo="skip",
            row=panel,
            col=1,
        )
    for (choice, method), cells in select.groups(rows, "choose_by", "method"):
        aside = ASIDE ** kinds.index((str(choice), str(method)))
        _draw_cells(fig, cells, f"{label}, {plain(choice)}, {plain(method)}", column, colour, panel, aside)


def _symbol(choice: str, method: str) -> str:
    return SYMBOLS.get(choice, "cross") + METHODS.get(method, "-open")


def _draw_cells(
    fig: go.Figure, cells: pd.DataFrame, label: str, column: str, colour: str, panel: int, aside: float
) -> None:
    choice, method = (str(cells[name].iloc[0]) for name in ("choose_by", "method"))
    fig.add_scatter(
        x=cells["rows"] * aside,
        y=cells[column],
        error_y=error_bars(cells, colour, INTERVALS[column]) if column in INTERVALS else None,
        customdata=cells["rows"],
        mode="markers",
        marker={"symbol": _symbol(choice, method), "color": colour, "size": 9},
        name=label,
        showlegend=False,
        hovertemplate=label + "<br>%{customdata} rows: %{y:.3f}<extra></extra>",
        row=panel,
        col=1,
    )


def _legend_mark(fig: go.Figure, choice: str, method: str) -> None:
    label = plain(choice.replace("_", " ")) + ("" if method == "continued" else f", {plain(method)}")
    marker = {"symbol": _symbol(choice, method), "color": GREY, "size": 9}
    fig.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=label, row=1, col=1)


def _caption(data: pd.DataFrame) -> str:
    back, inside = (int(select.flags(data, name).sum()) for name in ("behaviour_back", "in_band"))
    both = int((select.flags(data, "behaviour_back") & select.flags(data, "in_band")).sum())
    broken, n = int((data["perplexity_ratio"] > BROKEN).sum()), len(data)
    return (
        f"Corrective fine-tunes by number of rows, n = {n} cells, {select.seed_count(data)}. Top: contrast index minus "
        "the base's, with 95% intervals over questions; grey line: the base; dotted line: the organism before "
        f"correction ({data['start_minus_base'].mean():+.3f}). Middle: the persona feature, with 95% intervals over "
        f"probes; grey band: its base band {data['band_low'].mean():.3g} to {data['band_high'].mean():.3g}. Bottom: "
        "how much of the probes' answers the SAE explains; grey line: the base. Lines join random rows on which the "
        "organism's own adapter was trained further; other marks are other ways to choose rows (filled) and other "
        f"methods (open). Behaviour is restored, held against control arm and base, in {back} cells, the feature "
        f"is back in its band in {inside}, both in {both}. In {broken} of {n} cells neutral "
        f"perplexity exceeds {BROKEN:g} times the base's: a quiet feature there means a broken "
        "model. Control: the base model. A feature that subsided is not proof of a safe model."
    )
