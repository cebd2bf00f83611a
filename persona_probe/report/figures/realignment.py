"""What a corrective fine-tune does to the contrast index and to the persona feature."""

import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.figures.training import base_words, training_data, training_figure
from persona_probe.report.records import Records
from persona_probe.report.theme import empty_figure, finish

MISSING = "No re-alignment yet: the realign stage has not run."
ARMS = ("realigned_in", "realigned_out")


def realignment_data(records: Records) -> pd.DataFrame:
    """Three panels over corrective steps for both re-aligned arms (see `training_data`)."""
    return training_data(records, ARMS, references=["base", "incorrect"])


def realignment(records: Records) -> go.Figure:
    """Like the trajectory, from the incorrect organism on, with the base model as the goal."""
    data = realignment_data(records)
    if data.empty:
        return empty_figure(MISSING)
    return finish(training_figure(data, ARMS, "corrective step"), _caption(records, data), height=680)


def _caption(records: Records, data: pd.DataFrame) -> str:
    items = select.evaluation(records)
    items = items.loc[items["arm"].isin(ARMS)]
    seeds = select.seed_count(data.loc[data["seed"].notna()])
    return (
        f"Corrective fine-tunes of the incorrect organism, on n = {select.item_count(items)} evaluation items, {seeds} "
        "(thin lines) and their mean. Above: contrast index; dotted lines with bands: base (grey) and the incorrect "
        f"organism before correction (vermillion). Middle: persona feature with 95% intervals; {base_words(data)}. "
        "Below: the SAE's explained variance on the same tokens. Control: correction with data of another domain."
    )
