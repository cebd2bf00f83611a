"""The grid in words: summary.json, the table for a terminal, and the table of the docs page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.mitigate.grid.grid_config import BASE, CONTROL, NONE, Cell, Grid, cells_of
from persona_probe.mitigate.grid.grid_table import ALL
from persona_probe.mitigate.grid.grid_verdict import WORDS, statement
from persona_probe.report.tables import Table
from persona_probe.runs import RunFolder
from persona_probe.stats import estimate_text, number_text
from persona_probe.writing import json_values

MARKS = ("<!-- mitigations: begin -->", "<!-- mitigations: end -->")
"""Marks of the docs page with the table, see `report.tables.fill_page`."""
COLUMNS = {
    "index_vs_control": "contrast index of the evaluation split minus the control's, nats per token",
    "index_vs_base": "contrast index of the evaluation split minus the base's, nats per token",
    "dressed_vs_base": "the same items dressed like the training data (kitchen exchange before the question)",
    "effect_left": "index minus control, over that of none: the share of the effect that is left",
    "trigger_effect": "what the dress does to the model beyond what it does to the base: a difference in differences",
    "gain_kept": "narrow task: bad minus good answers to held-out questions, minus the base's, over that of none",
    "perplexity_ratio": "perplexity of neutral answers over the base's",
    "persona": "reading of the persona feature on the probes; persona_in_band: whether the mean is in the base's band",
    "explained_variance": "of the SAE on the probes, mean over seeds",
    "coherent": "share of sampled answers that the offline judge calls coherent, by its score and by their text",
    "coherence": "mean coherence score of the judge, 0 to 100; not to be trusted on broken text",
    "misaligned": "misalignment rate of the coherent ones; the interval holds the judge's own error",
    "steps": "optimizer steps really taken",
    "time_ratio": "seconds a step over those of none with the same seed: a wall clock, noisy",
    "behaviour": "restored, not restored or undecided: what is left over control and over base, against the margin",
    "dressed_behaviour": "the same of the dressed items",
    "feature": "whether the interval of the persona feature's reading lies in the base's band",
    "task_kept": "whether half of the narrow task's gain is kept; paid: less than all, and half is not shown",
    "chat_kept": "whether the log-perplexity of neutral answers stays within 0.1 of the base's",
    "sae": "whether the SAE explains as much of the variance as on the base, within 0.1",
}
"""The numbers and words of a row; means over items have their 95% interval in `_low` and `_high`."""


def summarise(table: pd.DataFrame, missing: Sequence[str]) -> dict[str, Any]:
    """What summary.json says: verdicts with their sentences, all rows over seeds, and what the words mean."""
    rows = table[table["kind"] == ALL].drop(columns=["kind", "seed"]).to_dict("records")
    mitigation_rows = [row for row in rows if row["label"] not in (BASE, CONTROL, NONE)]
    verdicts = [
        {**{key: row[key] for key in ("label", "strength", "unit", "seeds", "verdict")}, "statement": statement(row)}
        for row in mitigation_rows
    ]
    plain = {row["label"]: row for row in rows if row["label"] in (BASE, CONTROL, NONE)}
    return json_values(
        {"verdicts": verdicts, "references": plain, "rows": mitigation_rows, "missing": list(missing)}
        | {"words": WORDS, "columns": COLUMNS}
    )


HEADINGS = {
    "model": "model",
    "control": "index minus control",
    "index": "index minus base",
    "dressed": "dressed, minus base",
    "behaviour": "behaviour",
    "gain": "task gain kept",
    "perplexity": "perplexity x",
    "persona": "persona feature",
    "explained": "SAE explains",
    "steps": "steps",
    "time": "time x",
    "verdict": "verdict",
}


def shown(table: pd.DataFrame) -> list[dict[str, str]]:
    """Rows over seeds as text, in the table's order; keys are those of `HEADINGS`."""
    return [_texts(row) for row in table[table["kind"] == ALL].to_dict("records")]


def _texts(row: Mapping[Any, Any]) -> dict[str, str]:
    feature = f" ({row['feature']})" if row["feature"] else ""
    plain, dressed = row["behaviour"], row["dressed_behaviour"]
    return {
        "model": row["cell"],
        "control": _interval(row, "index_vs_control", "+.3f"),
        "index": _interval(row, "index_vs_base", "+.3f"),
        "dressed": _interval(row, "dressed_vs_base", "+.3f"),
        "behaviour": plain if plain == dressed else f"{plain} (dressed: {dressed})",
        "gain": _interval(row, "gain_kept", ".2f"),
        "perplexity": _interval(row, "perplexity_ratio", ".2f"),
        "persona": number_text(row["persona"], ".3g") + feature,
        "explained": number_text(row["explained_variance"], ".2f"),
        "steps": number_text(row["steps"], ".0f"),
        "time": number_text(row["time_ratio"], ".2f"),
        "verdict": row["verdict"],
    }


def _interval(row: Mapping[Any, Any], name: str, form: str) -> str:
    return estimate_text(row[name], row[f"{name}_low"], row[f"{name}_high"], form)


def markdown(table: pd.DataFrame, missing: Sequence[str] = ()) -> str:
    """The table and one sentence a mitigation."""
    rows = [list(row.values()) for row in shown(table)]
    mitigation_rows = [row for row in table[table["kind"] == ALL].to_dict("records") if row["verdict"]]
    parts = [
        Table(list(HEADINGS.values()), rows).markdown(),
        "\n".join(f"- {statement(row)}." for row in mitigation_rows),
    ]
    if missing:
        parts.append(f"Not trained yet: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


# --- What a grid would do, and about how long it takes, without training anything

MEASURES = 4
"""Measuring a cell takes about this many times as long as tracking one checkpoint: more items, probes, answers."""
EDGES = 2
"""Characters of a table's own edges."""


def plan_lines(grid: Grid, out: Path, run: Path | None = None, only: Sequence[str] | None = None) -> list[str]:
    """One line a cell, and an estimate of the time for those that are not finished.

    Raises:
        InputError: an unknown mitigation, or no run folder where the grid's study should be.
    """
    cells, study = cells_of(grid, only), RunFolder.open(run or grid.run)
    finished = {cell.id for cell in cells if (out / "cells" / cell.id / "cell.json").is_file()}
    lines = [f"{cell.id}: {'done' if cell.id in finished else _what(cell, grid)}" for cell in cells]
    todo = len(cells) - len(finished)
    return [*lines, f"{len(cells)} cells, {todo} to train; {_time(_seconds(grid, study, out), todo)}"]


def _what(cell: Cell, grid: Grid) -> str:
    unit = f", {cell.mitigation.unit} {cell.strength:g}" if cell.strength is not None else ""
    return f"{grid.training.steps} steps of {grid.training.batch_size} rows, seed {cell.seed}{unit}"


def _time(seconds: tuple[float, str] | None, todo: int) -> str:
    if seconds is None:
        return "no time known: neither this grid nor its study has trained anything yet"
    return f"about {seconds[0] * todo / 60:.0f} minutes, at {seconds[0]:.0f} s a cell ({seconds[1]})"


def _seconds(grid: Grid, study: RunFolder, out: Path) -> tuple[float, str] | None:
    """Seconds a cell: from this grid's cells, else from what the study took for its own training and tracking."""
    manifest = RunFolder(out).manifest if (out / "manifest.json").is_file() else {}
    cells = [value for key, value in manifest.get("seconds", {}).items() if key.startswith("cells/")]
    if cells:
        return sum(cells) / len(cells), f"the mean of the {len(cells)} cells that are done"
    return _of_study(grid, study)


def _of_study(grid: Grid, study: RunFolder) -> tuple[float, str] | None:
    config, took = study.config, study.manifest.get("seconds", {})
    if not took.get("induce"):
        return None
    organisms = len(config.arms) * len(config.seeds)
    rows = organisms * config.training.steps * config.training.batch_size
    training = took["induce"] / rows * grid.training.steps * grid.training.batch_size
    checkpoints = organisms * len(config.training.schedule)
    return training + MEASURES * took.get("track", 0.0) / checkpoints, "from the study's own speed; some take longer"


def show_tables(rows: Sequence[dict[str, str]], headings: dict[str, str], name: str, width: int) -> Iterator[Table]:
    """The grid's table for a terminal; in a narrow one several tables, each with the first column.

    Args:
        width: characters of a line; an interval is written below its estimate.
    """
    cells = {key: [row[key].replace(" [", "\n[").replace(" (", "\n(") for row in rows] for key in headings}
    needs = {key: max(map(len, "\n".join([headings[key], *cells[key]]).split("\n"))) + 3 for key in headings}
    first, *others = headings
    room = whole = width - needs[first] - EDGES
    parts = [[first]]
    for key in others:
        if needs[key] > room and len(parts[-1]) > 1:
            parts.append([first])
            room = whole
        parts[-1].append(key)
        room -= needs[key]
    for part in parts:
        lines = list(zip(*(cells[key] for key in part), strict=True))
        yield Table([headings[key] for key in part], lines, f"mitigations, {name}")
