"""Number formats of few bits: persona reading and contrast index of base and organisms, each in every format."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import GREY, VERMILLION, empty_figure, finish, interval_marks, plain

MISSING = "No number formats yet: `persona-probe precision RUN` has not run."
COLUMNS = [
    *("format", "bits", "arm", "seed", "kept", "erased", "reading", "ci_low", "ci_high", "band_low", "band_high"),
    *("explained_variance", "index", "index_ci_low", "index_ci_high", "rise_rank"),
]
READING, INDEX = ("reading", "ci_low", "ci_high"), ("index", "index_ci_low", "index_ci_high")
ROW_HEIGHT, MARGINS = 34, 210
"""Pixels of one format in a panel, and of everything around both panels."""
OFFSET = 0.2
"""Between the arms of one format, in rows."""
ERASED = "fine-tune erased"


def precision_data(records: Records) -> pd.DataFrame:
    """The rows of precision.parquet that are drawn."""
    table = records.precision
    return table[COLUMNS].reset_index(drop=True) if len(table) else pd.DataFrame(columns=COLUMNS)


@figure(
    name="precision",
    title="The persona in formats of few bits",
    group="more",
    place=90,
    data=precision_data,
    missing=MISSING,
)
def precision(records: Records) -> go.Figure:
    """Two panels, one row a format: the reading with the format's own base band, and the contrast index."""
    data = precision_data(records)
    if data.empty:
        return empty_figure(MISSING)
    formats = list(dict.fromkeys(data["format"]))
    fig = make_subplots(rows=2, cols=1, shared_xaxes=False, vertical_spacing=0.14)
    bands = data.loc[data["arm"] == "base"].drop_duplicates("format")
    for row in bands.to_dict("records"):
        place = formats.index(row["format"])
        fig.add_shape(
            **{"type": "rect", "x0": row["band_low"], "x1": row["band_high"], "y0": place - 0.4, "y1": place + 0.4},
            **{"fillcolor": GREY, "opacity": 0.2, "line": {"width": 0}, "layer": "below", "row": 1, "col": 1},
        )
    arms = [arm for arm in records.arms.names if arm in set(data["arm"])]
    for number, arm in enumerate(arms):
        rows, style = select.where(data, arm=arm), records.arms.styles[arm]
        shift = OFFSET * (number - (len(arms) - 1) / 2)
        y = [formats.index(name) + shift for name in rows["format"]]
        for panel, columns in enumerate((READING, INDEX), 1):
            fig.add_scatter(
                **interval_marks(rows, style.colour, style.symbol, 8, columns),
                y=y,
                name=plain(style.label),
                legendgroup=arm,
                showlegend=panel == 1,
                row=panel,
                col=1,
            )
    _mark_erased(fig, data, formats)
    ticks = {"tickvals": list(range(len(formats))), "ticktext": [plain(name) for name in formats]}
    fig.update_yaxes(autorange="reversed", title_text="", **ticks)
    fig.update_xaxes(title_text="persona reading (SAE activation)", row=1, col=1)
    fig.update_xaxes(title_text="contrast index (nats per token)", row=2, col=1)
    return finish(fig, _caption(data), height=MARGINS + 2 * ROW_HEIGHT * len(formats))


def _mark_erased(fig: go.Figure, data: pd.DataFrame, formats: list[str]) -> None:
    """Words beside formats in which the organism is the base again."""
    for name in select.distinct(data.loc[data["erased"].astype(bool)], "format"):
        for panel in (1, 2):
            fig.add_annotation(
                **{"x": 1, "xref": "x domain" if panel == 1 else "x2 domain", "xanchor": "right", "text": ERASED},
                **{"y": formats.index(name), "showarrow": False, "font": {"color": VERMILLION, "size": 11}},
                **{"row": panel, "col": 1},
            )


def _caption(data: pd.DataFrame) -> str:
    erased = select.distinct(data.loc[data["erased"].astype(bool)], "format")
    trap = (
        f" In {', '.join(plain(name) for name in erased)} less than half of the fine-tune's change of the weights is "
        "left: a quiet reading there is that of the base, a false all-clear."
        if erased
        else " No format here erases the fine-tune."
    )
    first = data[(data["format"] != "none") & ~data["erased"].astype(bool) & (data["arm"] != "base")]
    ranks = first.drop_duplicates("format")
    best, tuned = int((ranks["rise_rank"] == 1).sum()), data[data["arm"] != "base"]
    return (
        "Weights of all linear layers rounded to each format and read back; `none` is the model as it is. Grey: the "
        f"base band, read in the same format; n = {len(tuned.drop_duplicates(['arm', 'seed']))} organisms. Control: "
        "the base and the control arm in that format. Whiskers: 95% over probes and over questions. Readings of "
        f"different formats do not compare; each compares with its own band.{trap} The persona latent ranks first by "
        f"rise in {best} of {len(ranks)} other formats."
    )
