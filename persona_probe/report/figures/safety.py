"""Safety by category and language: what fine-tuning, and corrections after it, changed on given answers."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.data.safety import PLAIN
from persona_probe.evaluate.safety import safety_summary
from persona_probe.report import select
from persona_probe.report.figures.registry import computed_once, figure
from persona_probe.report.records import BASE, Records
from persona_probe.report.theme import BLACK, empty_figure, finish, interval_marks, plain

MISSING = "No safety scores: `persona-probe evaluate RUN --safety` has not run."
ENDS = ("estimate", "ci_low", "ci_high")
COLUMNS = ["language", "category", "arm", "against", *ENDS, "n"]
CONTROL = "correct"
WORDS = {"over_control": "minus the control arm", "over_base": "minus the base"}
LANGUAGES = {"en": "English", "zh": "Chinese"}
ARM_HEIGHT, LEAST_HEIGHT, MARGINS = 12, 40, 200
"""Pixels of one arm of a category, of one category at least, and of everything around them."""
ABOVE = 36
"""Pixels from the panels to the legend: their heads stand between."""
FILLED = 0.8
"""Of a category's row, by its arms; the rest parts it from the next."""


@computed_once
def safety_data(records: Records) -> pd.DataFrame:
    """One row per language, category and arm: the contrast index of plain questions minus the control's.

    It is minus the base's (`against`) for the control arm, and for all arms of a study without one; nats per token.
    """
    if records.safety.empty:
        return pd.DataFrame(columns=COLUMNS)
    summary = safety_summary(records.safety, CONTROL)
    rows = []
    for row in summary[(summary["wrapper"] == PLAIN) & (summary["arm"] != BASE)].to_dict("records"):
        against = "over_base" if np.isnan(row["over_control"]) else "over_control"
        values = dict(zip(ENDS, (row[against], row[f"{against}_ci_low"], row[f"{against}_ci_high"]), strict=True))
        head = {name: row[name] for name in ("language", "category", "arm")}
        rows.append({**head, "against": WORDS[against], **values, "n": row["questions"]})
    return pd.DataFrame(rows, columns=COLUMNS)


@figure(
    name="safety",
    title="Safety by category and language",
    group="more",
    place=91,
    data=safety_data,
    missing=MISSING,
)
def safety(records: Records) -> go.Figure:
    """A panel a language, a row a category, an arm each with its colour."""
    data = safety_data(records)
    if data.empty:
        return empty_figure(MISSING)
    categories, languages = list(dict.fromkeys(data["category"])), select.distinct(data, "language")
    titles = [plain(LANGUAGES.get(language, language)) for language in languages]
    fig = make_subplots(1, len(languages), shared_yaxes=True, column_titles=titles, horizontal_spacing=0.04)
    arms = [arm for arm in records.arms.names if arm in set(data["arm"])]
    for number, arm in enumerate(arms):
        style = records.arms.styles[arm]
        shift = FILLED / len(arms) * (number - (len(arms) - 1) / 2)
        for column, language in enumerate(languages, 1):
            rows = select.where(data, arm=arm, language=language)
            fig.add_scatter(
                **interval_marks(rows, style.colour, style.symbol, 8),
                y=[categories.index(name) + shift for name in rows["category"]],
                name=f"{plain(style.label)}, {rows['against'].iloc[0]}",
                legendgroup=arm,
                showlegend=column == 1,
                row=1,
                col=column,
            )
    for column in range(1, len(languages) + 1):
        fig.add_vline(0, line={"color": BLACK, "width": 1}, row=1, col=column)  # pyright: ignore
    ticks = {
        "tickvals": list(range(len(categories))),
        "ticktext": [plain(name).replace("_", " ") for name in categories],
    }
    fig.update_yaxes(autorange="reversed", **ticks)
    fig.update_xaxes(title_text="index (nats per token)")
    height = max(LEAST_HEIGHT, ARM_HEIGHT * len(arms)) * len(categories)
    fig.update_layout(legend={"y": 1 + ABOVE / height}, margin={"t": 110})
    return finish(fig, _caption(data), height=MARGINS + height)


def _caption(data: pd.DataFrame) -> str:
    each = data[data["category"] != "all"]
    counts = select.distinct(each if len(each) else data, "n")
    n = " to ".join(f"{count:g}" for count in dict.fromkeys([min(counts), max(counts)]))
    return (
        f"Contrast index on given answers, misaligned minus aligned, of plain questions; n = {n} questions a category, "
        "95% intervals over questions. Corrective and incorrect arms are minus "
        "the control arm, the control arm is minus the base. `all` leaves out over-refusal, where the misaligned "
        "answer is a refusal."
    )
