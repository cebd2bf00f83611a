"""Labels of latents: how well each tells passages, and tokens, on which its latent fires."""

import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.cards import LEAST_SCORE, NO_LABEL, saved_explanation
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import Records
from persona_probe.report.theme import GREY, PALETTE, empty_figure, finish, interval_marks, plain

MISSING = "No scored labels: `persona-probe label RUN` has not run."
SCORES = ("detection", "fuzzing")
X, Y = ((name, f"{name}_low", f"{name}_high") for name in SCORES)
COLUMNS = ["latent", "author", "label", *X, *Y, "n"]
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
CHANCE = 0.5


def labels_data(records: Records) -> pd.DataFrame:
    """One row per scored label of the cards; `label` is `no label` where a score is too low."""
    rows = []
    for card in records.cards:
        for one in map(saved_explanation, card.get("explanations") or ()):
            if one.detection is None or one.fuzzing is None:
                continue
            row = {"latent": card["latent"], "author": one.author, "label": one.label, "n": one.detection.n}
            for name, score in zip(SCORES, (one.detection, one.fuzzing), strict=True):
                row |= {name: score.estimate, f"{name}_low": score.ci_low, f"{name}_high": score.ci_high}
            rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


@figure(
    name="labels",
    title="Labels of latents and their scores",
    group="more",
    place=92,
    data=labels_data,
    missing=MISSING,
)
def labels(records: Records) -> go.Figure:
    """Fuzzing against detection, a mark a label; labels in the upper right corner count."""
    data = labels_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = go.Figure()
    for number, author in enumerate(dict.fromkeys(data["author"])):
        rows, colour = select.where(data, author=author), PALETTE[number % len(PALETTE)]
        fig.add_scatter(
            **interval_marks(rows, colour, SYMBOLS[number % len(SYMBOLS)], 9, X, Y),
            text=[f"latent {row['latent']}: {plain(row['label'])}" for row in rows.to_dict("records")],
            hovertemplate="%{text}<br>detection %{x:.2f}, fuzzing %{y:.2f}<extra></extra>",
            name=f"by {plain(author)}",
            showlegend=True,
        )
    fig.add_shape(
        **{"type": "rect", "x0": LEAST_SCORE, "y0": LEAST_SCORE, "x1": 1.02, "y1": 1.02, "layer": "below"},
        **{"fillcolor": GREY, "opacity": 0.15, "line": {"width": 0}},
    )
    for add in (fig.add_vline, fig.add_hline):
        add(CHANCE, line={"color": GREY, "dash": "dot", "width": 1.2})
    fig.update_xaxes(title_text="detection (balanced accuracy)", range=[0.35, 1.02])
    fig.update_yaxes(title_text="fuzzing (balanced accuracy)", range=[0.35, 1.02])
    good = int((data["label"] != NO_LABEL).sum())
    caption = (
        f"Each mark is a label of a latent, n = {len(data)}: {good} reach {LEAST_SCORE:g} in both scores (grey) and "
        "count. Detection tells passages on which the latent fires from others, fuzzing its tokens from others; both "
        "on held-out questions, with 95% intervals. Control: chance, 0.5 (dotted)."
    )
    return finish(fig, caption, height=460)
