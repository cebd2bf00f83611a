"""What a corrective fine-tune does to the contrast index and to the persona feature."""

import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.figures.training import base_words, training_data, training_figure
from persona_probe.report.labels import CORRECTS_NOTHING
from persona_probe.report.records import BASE, REALIGN_STYLES, Records
from persona_probe.report.theme import empty_figure, finish, plain

CONTROL = "correct"
MISSING = "No re-alignment yet: the realign stage has not run."


def realignment_data(records: Records) -> pd.DataFrame:
    """Three panels over corrective steps for the re-aligned arms (see `training_data`)."""
    return training_data(records, records.arms.realigned, references=[BASE, *_control_arm(records), records.arms.start])


@figure(
    name="realignment",
    title="What a corrective fine-tune undoes",
    paper="16",
    group="study",
    place=40,
    data=realignment_data,
    missing=MISSING,
)
def realignment(records: Records) -> go.Figure:
    """Like the trajectory, but it starts at the organism that is corrected and aims at the base model."""
    data = realignment_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = training_figure(data, records.arms.realigned, records.arms.styles, "corrective step")
    return finish(fig, _caption(records, data), height=680)


def _caption(records: Records, data: pd.DataFrame) -> str:
    items = select.evaluation(records)
    items = items.loc[items["arm"].isin(records.arms.realigned)]
    seeds = select.seed_count(data.loc[data["seed"].notna()])
    start = plain(records.arms.start)
    return (
        f"Corrective fine-tunes of the {start} organism, on n = {select.item_count(items)} evaluation items, {seeds} "
        f"(thin lines) and their mean. Above: contrast index; dotted lines: base (grey), {_control_words(records)}"
        f"and the {start} organism before correction. Middle: persona feature with 95% intervals; {base_words(data)}. "
        f"Below: the SAE's explained variance on the same tokens. {_control(records)}"
    )


def _control_arm(records: Records) -> list[str]:
    return [CONTROL] if CONTROL in records.arms.induced and records.arms.start != CONTROL else []


def _control_words(records: Records) -> str:
    return "control arm (blue) " if _control_arm(records) else ""


def _control(records: Records) -> str:
    arms = records.arms.realigned
    if benign := [records.arms.label(arm) for arm in arms if records.arms.label(arm).endswith(CORRECTS_NOTHING)]:
        return f"Control: {plain(benign[0])}."
    if set(REALIGN_STYLES) <= set(arms):
        return "Control: correction with data of another domain."
    if len(arms) > 1:
        return "Control: the corrective arms against each other."
    return "Control: the control arm's level." if _control_arm(records) else "One corrective arm: no control."
