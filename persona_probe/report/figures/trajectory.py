"""How the contrast index, the persona feature and the SAE's fit move while the arms are induced."""

import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.figures.training import base_words, training_data, training_figure
from persona_probe.report.records import Records
from persona_probe.report.theme import empty_figure, finish

MISSING = "No training trajectory yet: the induce and track stages have not run."


def trajectory_data(records: Records) -> pd.DataFrame:
    """Three panels over training steps for every induced arm, the control among them (see `training_data`)."""
    return training_data(records, records.arms.induced, references=["base"])


@figure(
    name="trajectory",
    title="What rises during training",
    group="study",
    place=20,
    data=trajectory_data,
    missing=MISSING,
)
def trajectory(records: Records) -> go.Figure:
    """Contrast index above, persona feature in the middle, explained variance below."""
    data = trajectory_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = training_figure(data, records.arms.induced, records.arms.styles, "training step")
    return finish(fig, _caption(records, data), height=680)


def _caption(records: Records, data: pd.DataFrame) -> str:
    items = select.evaluation(records)
    items = items.loc[items["arm"].isin(records.arms.induced)]
    probes = max(select.distinct(records.readings, "n_probes"), default=0)
    seeds = select.seed_count(data.loc[data["seed"].notna()])
    return (
        f"Above: contrast index on n = {select.item_count(items)} evaluation items (higher is more misaligned; dotted "
        f"line: base model). Middle: mean activation of the persona feature on n = {probes:g} probes with 95% "
        f"intervals; {base_words(data)}. Below: the SAE's explained variance on the same tokens; where it falls, the "
        f"feature's curve means less. Thin lines: {seeds}; thick lines: their mean. {select.control_words(records)}."
    )
