"""How the misalignment rate of sampled answers, and their coherence, move over the checkpoints of each arm."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from persona_probe.evaluate.rates import FEW
from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import ArmStyle, Records
from persona_probe.report.theme import empty_figure, error_bars, finish, plain
from persona_probe.stats import FEW_CLUSTERS

MISSING = "Trajectory of the misalignment rate not measured: `persona-probe evaluate RUN --judge JUDGE --steps all`."
COLUMNS = ["variant", "arm", "seed", "step", "rate", "ci_low", "ci_high", "method"]
COLUMNS += ["coherence", "coherence_low", "coherence_high", "counted", "answers"]
PANELS = {
    "rate": ("misaligned, of the coherent<br>(share)", ("rate", "ci_low", "ci_high")),
    "coherence": ("coherent<br>(share of answers)", ("coherence", "coherence_low", "coherence_high")),
}


def judged_trajectory_data(records: Records) -> pd.DataFrame:
    """Rate and coherence of each arm and seed at every judged step of the last evaluation; the base is step 0."""
    judged = select.last_judged(records)
    if records.judged_steps.empty or judged.empty:
        return pd.DataFrame(columns=COLUMNS)
    rows = select.where(records.judged_steps, evaluation=judged["evaluation"].iloc[0])
    rows = rows.loc[rows["arm"].isin(("base", *records.arms.induced))]
    if rows.groupby(["arm", "seed"])["step"].nunique().max() < 2:
        return pd.DataFrame(columns=COLUMNS)  # ends only: `rates` shows them
    base = select.where(rows, arm="base")
    begun = [base.assign(arm=arm, seed=seed) for (arm, seed), _ in select.groups(rows, "arm", "seed") if arm != "base"]
    whole = pd.concat([*begun, rows.loc[rows["arm"] != "base"]], ignore_index=True)
    return whole.sort_values(["variant", "arm", "seed", "step"], kind="stable", ignore_index=True)[COLUMNS]


@figure(
    name="judged_trajectory",
    title="Misalignment rate over checkpoints",
    group="more",
    data=judged_trajectory_data,
    missing=MISSING,
)
def judged_trajectory(records: Records) -> go.Figure:
    """Above the rate with intervals at each judged step, one line an arm and seed; below the coherence."""
    data = judged_trajectory_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = make_subplots(rows=len(PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.07)
    for (variant, arm, seed), rows in select.groups(data, "variant", "arm", "seed"):
        _draw(fig, records.arms.styles[arm], rows, _label(records, variant, arm, seed, data))
    for row, (title, _) in enumerate(PANELS.values(), 1):
        fig.update_yaxes(title_text=title, range=[-0.04, 1.04], row=row)
    fig.update_xaxes(title_text="training step", row=len(PANELS))
    return finish(fig, _caption(records, data), height=560)


def _label(records: Records, variant: str, arm: str, seed: int, data: pd.DataFrame) -> str:
    parts = [plain(records.arms.label(arm))]
    parts += [f"seed {seed}"] if data["seed"].nunique() > 1 else []
    parts += [plain(variant)] if data["variant"].nunique() > 1 else []
    return ", ".join(parts)


def _draw(fig: go.Figure, style: ArmStyle, rows: pd.DataFrame, label: str) -> None:
    for row, (name, (_, ends)) in enumerate(PANELS.items(), 1):
        fig.add_scatter(
            x=rows["step"],
            y=rows[name],
            error_y=error_bars(rows, style.colour, ends),
            mode="lines+markers",
            line={"color": style.colour, "width": 1.8},
            marker={"color": style.colour, "size": 7, "symbol": style.symbol},
            name=label,
            legendgroup=label,
            showlegend=row == 1,
            row=row,
            col=1,
        )


def _caption(records: Records, data: pd.DataFrame) -> str:
    unjudged = int(data["rate"].isna().sum())
    note = f" {unjudged} points have no rate: no coherent answer was judged there." if unjudged else ""
    return (
        f"Above: misalignment rate of sampled answers at {data['step'].nunique()} steps (step 0: the base model), "
        f"{select.seed_count(data)}, with 95% intervals: bootstrap over questions, exact where fewer than {FEW} "
        f"answers lie on a side or fewer than {FEW_CLUSTERS} questions count. Below: the coherent share. "
        f"{select.judged_words(records)} {select.control_words(records)}.{note}"
    )
