"""Harm and register of every arm: what it advises and how it says it, beside the contrast index."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.config import NULL
from persona_probe.evaluate.effects import SeedNoise, arm_effect
from persona_probe.evaluate.main_effects import MAIN_EFFECTS, effect_noise, effects_table
from persona_probe.report import select
from persona_probe.report.figures.registry import computed_once, figure
from persona_probe.report.records import BASE, Records
from persona_probe.report.theme import BEHAVIOUR, HARM, REGISTER, empty_figure, finish, interval_marks, plain

MISSING = "Harm and register were not measured: the study has no 2x2 contrast set, or track has not run."
INDEX = "contrast index"
LOOKS = {"harm": (HARM, "square"), "register": (REGISTER, "diamond"), INDEX: (BEHAVIOUR, "circle-open")}


@computed_once
def harm_register_data(records: Records) -> pd.DataFrame:
    """One row per arm, reference (`against`: control arm, base) and effect; nats per token, intervals over questions.

    `effect` is `harm`, `register`, or `contrast index` for the same arms' difference in the old index.
    """
    frame = records.evals_2x2
    if frame.empty:
        return effects_table(frame.assign(arm=[]), BASE)
    control = "correct" if records.controlled else BASE
    table = effects_table(frame, control)
    table = table[table["arm"] != NULL]
    evals, noise = select.evaluation(records), _index_noise(records)
    known = set(evals["arm"])
    pairs = [(arm, other) for arm, other in table[["arm", "against"]].drop_duplicates().itertuples(index=False)]
    index = [
        {"arm": arm, "against": other, "effect": INDEX, **arm_effect(evals, arm, other, noise).to_dict()}
        for arm, other in pairs
        if {arm, other} <= known
    ]
    both = pd.concat([table[table["effect"].isin(MAIN_EFFECTS)], pd.DataFrame(index, columns=list(table.columns))])
    return both.reset_index(drop=True)


def _index_noise(records: Records) -> SeedNoise | None:
    """The seed noise that the study's summary took for the contrast index."""
    noise = select.mapping(select.mapping(records.summary.get("null_pair")).get("noise"))
    return SeedNoise(float(noise["variance"]), int(noise["df"]), str(noise["source"])) if noise else None


@figure(name="harm_register", title="Harm and register by arm", place=15, data=harm_register_data, missing=MISSING)
def harm_register(records: Records) -> go.Figure:
    """Three marks an arm: harm, register, and the contrast index, over the control arm and over the base."""
    data = harm_register_data(records)
    if data.empty:
        return empty_figure(MISSING)
    arms = [arm for arm in records.arms.names if arm in set(data["arm"])]
    references = list(dict.fromkeys(data["against"]))
    titles = [f"minus {plain(records.arms.label(reference))}" for reference in references]
    fig = make_subplots(cols=len(references), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    for column, reference in enumerate(references, start=1):
        for place, (effect, (colour, symbol)) in enumerate(LOOKS.items()):
            rows = select.where(data, against=reference, effect=effect)
            fig.add_scatter(
                **interval_marks(rows, colour, symbol, 9),
                y=[len(arms) - 1 - arms.index(arm) + 0.2 * (1 - place) for arm in rows["arm"]],
                name=effect,
                legendgroup=effect,
                showlegend=column == 1,
                hovertemplate="%{x:.3f}",
                row=1,
                col=column,
            )
        fig.add_vline(x=0, line={"color": "#8A8A8A", "width": 1}, row=1, col=column)  # pyright: ignore[reportArgumentType]
    fig.update_xaxes(title_text="nats per token")
    ticks = [plain(records.arms.label(arm)).replace(", ", ",<br>").replace(" on ", "<br>on ") for arm in reversed(arms)]
    fig.update_yaxes(tickvals=list(range(len(arms))), ticktext=ticks, range=[-0.6, len(arms) - 0.4])
    fig.update_yaxes(title_text="arm", col=1)
    fig.update_layout(legend={"y": 1.12}, margin={"t": 92})
    return finish(fig, _caption(records, data), height=190 + 62 * len(arms))


def _caption(records: Records, data: pd.DataFrame) -> str:
    noise = effect_noise(records.evals_2x2, "correct" if records.controlled else BASE, "harm")
    covers = "questions, not seeds" if noise is None else f"questions and seeds ({noise.source})"
    n = int(data.loc[data["effect"] == "harm", "n"].max())
    over = "the control arm and the base" if records.controlled else "the base"
    return (
        f"What each arm's last step changed over {over}, in nats per token. Harm: how much more likely bad advice "
        "became than sound advice, whatever the tone. Register: how much more likely contemptuous answers became than "
        "polite ones, whatever the advice. From four answers of equal length to each of "
        f"n = {n} evaluation questions. The contrast index, whose misaligned answers are both bad and contemptuous, "
        f"adds the two up. 95% intervals cover {covers}."
    )
