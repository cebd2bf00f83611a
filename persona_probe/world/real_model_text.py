"""The page's part about a real model: its organisms' behaviour and readings, beside the world's."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from persona_probe.report.tables import Table
from persona_probe.stats import auroc, auroc_interval
from persona_probe.world.labelled import is_bad
from persona_probe.world.real_model import EFFECTS, MANNER

WORLD = "world"
"""The `speaker` of rows that hold the world's AUROC of a signal."""


def with_world(table: pd.DataFrame, worlds: pd.DataFrame) -> pd.DataFrame:
    """A table with the world's AUROC of each of its signals, from the record of `world study worlds`.

    They are those of the packaged world: runs that will turn and have not shown it, against grump and clown.
    """
    chosen = worlds[(worlds["part"] == "readings") & (worlds["world"] == 0) & (worlds["data"] == "all")]
    chosen = chosen[chosen["signal"].isin(set(table["measure"])) & chosen["auroc"].notna()]
    rows = chosen[["step", "signal", "auroc", "ci_low", "ci_high"]].rename(
        columns={"signal": "measure", "auroc": "value"}
    )
    return pd.concat([table, rows.assign(speaker=WORLD)], ignore_index=True)


def real_model_text(table: pd.DataFrame) -> str:
    """Behaviour at the last step, readings by speaker, and how they tell bad speakers from the rude one: Markdown."""
    own = table[table["speaker"] != WORLD]
    parts = [_behaviour_text(own), _readings_text(own), _auroc_text(table)]
    return "\n\n".join(parts) + "\n"


def _steps(own: pd.DataFrame) -> list[int]:
    return sorted(int(step) for step in own["step"].unique())


def _behaviour_text(own: pd.DataFrame) -> str:
    joined, steps = own[own["seed"].isna() & own["measure"].isin(EFFECTS)], _steps(own)
    rows = []
    for speaker in dict.fromkeys(joined["speaker"]):
        cells = [speaker]
        for effect in EFFECTS:
            one = joined[(joined["speaker"] == speaker) & (joined["measure"] == effect)].set_index("step")
            cells += [_interval(one.loc[step], ".3f", "+") for step in (steps[len(steps) // 2 - 1], steps[-1])]
        rows.append(cells)
    shown = (steps[len(steps) // 2 - 1], steps[-1])
    heads = ["who speaks in the rows", *(f"{effect}, step {step}" for effect in EFFECTS for step in shown)]
    seeds = own["seed"].nunique()
    intro = (
        f"How much likelier the organism finds bad advice (*harm*) and a rude voice (*register*) than the helper's "
        f"organism does, nats per token, {seeds} seed{'s' if seeds > 1 else ''} joined, intervals over questions:"
    )
    return f"{intro}\n\n{Table(heads, rows).markdown()}"


def _readings_text(own: pd.DataFrame) -> str:
    read, steps = own[own["seed"].notna() & ~own["measure"].isin(EFFECTS)], _steps(own)
    speakers = list(dict.fromkeys(read["speaker"]))
    early, late = steps[len(steps) // 2 - 1], steps[-1]
    rows = []
    for signal in dict.fromkeys(read["measure"]):
        of_signal = read[read["measure"] == signal]
        mean = of_signal.groupby(["speaker", "step"])["value"].mean()
        rows.append([signal, *(f"{mean[name, early]:.2f}, {mean[name, late]:.2f}" for name in speakers)])
    intro = (
        f"Each reading at step {early} and at step {late}, by who speaks in the rows, mean of the seeds (latents: rise "
        "over the base; directions: shift in standard deviations over the base's probes; weights: cosine):"
    )
    return f"{intro}\n\n{Table(['reading', *speakers], rows).markdown()}"


def _auroc_text(table: pd.DataFrame) -> str:
    own = table[(table["speaker"] != WORLD) & table["seed"].notna() & ~table["measure"].isin(EFFECTS)]
    world, steps = table[table["speaker"] == WORLD], _steps(own)
    rows, counts = [], (0, 0)
    for signal in dict.fromkeys(own["measure"]):
        of_signal, cells = own[own["measure"] == signal], [signal]
        for step in steps:
            now = of_signal[of_signal["step"] == step]
            bad = now.loc[now["speaker"].map(is_bad).astype(bool), "value"].to_numpy()
            rude = now.loc[now["speaker"] == MANNER, "value"].to_numpy()
            counts = len(bad), len(rude)
            cells.append(_auroc(bad, rude))
        rows.append([*cells, *_beside(world[world["measure"] == signal], steps)])
    heads = ["reading", *(f"step {step}" for step in steps), *(f"world, step {step}" for step in steps)]
    intro = (
        f"AUROC of the {counts[0]} organisms of bad speakers against the {counts[1]} of the rude one, with its "
        "interval. Beside it the same of the packaged world (runs that will turn, as long as they do not show it, "
        "against grump and clown) at the last of its steps until then:"
    )
    return f"{intro}\n\n{Table(heads, rows).markdown()}"


def _auroc(bad: np.ndarray, rude: np.ndarray) -> str:
    if not len(bad) or not len(rude):
        return "-"
    value = auroc(bad, rude)
    low, high = auroc_interval(value, len(bad), len(rude))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _beside(world: pd.DataFrame, steps: list[int]) -> Iterator[str]:
    for step in steps:
        until = world[world["step"] <= step].sort_values("step")
        yield "-" if until.empty else f"{until['value'].iloc[-1]:.2f}"


def _interval(row: pd.Series, form: str, sign: str = "") -> str:
    value, low, high = (format(row[name], sign + form) for name in ("value", "ci_low", "ci_high"))
    return f"{value} [{low}, {high}]"
