"""Score against the persona feature's reading, one mark for each checkpoint, with the reading that separates best."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from persona_probe.report import select
from persona_probe.report.figures.registry import figure
from persona_probe.report.records import BASE, Records
from persona_probe.report.theme import GREY, INTERVAL, empty_figure, finish, interval_marks, plain
from persona_probe.stats import auroc, paired_difference

MISSING = "No step has both a reading and a score yet: the track stage has not run."
COLUMNS = ["arm", "seed", "step", "reading", "reading_low", "reading_high", "n_probes"]
COLUMNS += ["estimate", "ci_low", "ci_high", "n", "misaligned"]


def separation_data(records: Records) -> pd.DataFrame:
    """One row per checkpoint: persona reading, contrast index minus the base's (paired by item), and `misaligned`.

    `misaligned`: the interval of that difference lies above zero (nats per token). Step 0 is left out: it is
    the base, or the organism that is corrected.
    """
    items = select.evaluation(records)
    base = select.last_step(select.where(items, arm=BASE)).set_index("item")["value"]
    persona = select.where(records.readings, feature=select.PERSONA).set_index(["arm", "seed", "step"])
    rows = []
    tuned = items.loc[(items["arm"] != BASE) & (items["step"] > 0)]
    for key, group in select.groups(tuned, "arm", "seed", "step"):
        items = group.set_index("item")["value"]
        if key in persona.index and items.index.isin(base.index).all():
            rows.append(_row(key, persona.loc[key], items, base))
    return pd.DataFrame(rows, columns=COLUMNS)


def _row(key: tuple[Any, ...], reading: Any, items: pd.Series, base: pd.Series) -> dict[str, Any]:
    rise = paired_difference(items.to_numpy(float), base.loc[items.index].to_numpy(float))
    arm, seed, step = key
    ends = {"reading_low": reading["ci_low"], "reading_high": reading["ci_high"], "n_probes": reading["n_probes"]}
    head = {"arm": arm, "seed": seed, "step": step, "reading": reading["mean"], **ends}
    return {**head, **rise.to_dict(), "misaligned": bool(rise.ci_low > 0)}


def threshold(data: pd.DataFrame) -> float | None:
    """The reading with the fewest errors on these very checkpoints (midway between two); None without both kinds."""
    readings, bad = data["reading"].to_numpy(float), data["misaligned"].to_numpy(bool)
    if bad.all() or not bad.any():
        return None
    order = np.unique(readings)
    cuts = (order[1:] + order[:-1]) / 2
    errors = [int(((readings > cut) != bad).sum()) for cut in cuts]
    return float(cuts[int(np.argmin(errors))]) if errors else None


@figure(
    name="separation",
    title="Score against reading",
    paper="9",
    group="more",
    place=10,
    data=separation_data,
    missing=MISSING,
)
def separation(records: Records) -> go.Figure:
    """Arms by colour, filled where misaligned; dashed: the separating reading."""
    data = separation_data(records)
    if data.empty:
        return empty_figure(MISSING)
    fig = go.Figure()
    for arm in (a for a in records.arms.names if a in set(data["arm"])):
        style = records.arms.styles[arm]
        rows = select.where(data, arm=arm)
        symbols = [style.symbol if bad else f"{style.symbol}-open" for bad in rows["misaligned"]]
        fig.add_scatter(
            **interval_marks(rows, style.colour, symbols, 8, ("reading", "reading_low", "reading_high"), INTERVAL),
            name=plain(style.label),
            customdata=rows["step"],
            hovertemplate="step %{customdata}: %{x:.3g}, %{y:.3f}",
        )
    fig.add_hline(y=0, line={"color": GREY, "dash": "dot", "width": 1.4})
    if (level := threshold(data)) is not None:
        fig.add_vline(x=level, line={"color": GREY, "dash": "dash", "width": 1.4})
    fig.update_xaxes(title_text="persona feature (mean activation)")
    fig.update_yaxes(title_text="contrast index minus base<br>(nats per token)")
    return finish(fig, _caption(records, data, level), height=460)


def _caption(records: Records, data: pd.DataFrame, level: float | None) -> str:
    bad = data["misaligned"].to_numpy(bool)
    readings = select.numbers(data, "reading")
    if level is None:
        words = "no threshold, since all checkpoints are of one kind"
    else:
        wrong = int(((readings > level) != bad).sum())
        area = auroc(readings[bad], readings[~bad])
        words = (
            f"dashed: the reading {level:.3g} that separates them best here ({wrong} of {len(data)} on the wrong side; "
            f"AUROC {area:.3g}; chosen on these same points, which share arms and seeds: expect less elsewhere)"
        )
    return (
        f"Each mark is one checkpoint, n = {len(data)}, {select.seed_count(data)}: contrast index minus the base's on "
        f"n = {max(data['n'])} evaluation items against the persona feature on n = {max(data['n_probes'])} probes, "
        f"with 95% intervals. Filled: misaligned, the interval lies above zero ({int(bad.sum())} checkpoints); "
        f"{words}. {select.control_words(records)}."
    )
