"""A grid of corrections: each cell a folder of its own, one table over all that are there."""

import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.errors import TrainingDiverged
from persona_probe.finetune.realignment.bench import Bench
from persona_probe.finetune.realignment.correct import OUTCOME, SPEC, correct, place_of, usable_rows
from persona_probe.finetune.realignment.plan import DosePlan
from persona_probe.finetune.realignment.spec import Correction

log = logging.getLogger(__name__)

TABLE = "realign/doses.parquet"
INTERVALS = ("index_minus_base", "start_minus_base", "feature", "band")
"""Entries of outcome.json that become several columns."""


def run_plan(ctx: Context, plan: DosePlan) -> pd.DataFrame:
    """Run every cell that is not there yet; the table is written anew after each, so that a cut-off grid is of use.

    A cell whose training diverges is recorded as such and the grid goes on; its `.diverged` folder keeps it from being
    tried again.

    Raises:
        InputError: data that some cell cannot use, told before the first is run; a cell made with other settings.
    """
    cells, bench = plan.cells(ctx.config), Bench(ctx)
    _check(ctx, [correction for _, _, correction in cells])
    for number, (seed, name, correction) in enumerate(cells):
        log.info("cell %d of %d: %s, seed %d", number + 1, len(cells), name, seed)
        if not ctx.run.has(f"{place_of(name, seed)}.diverged"):
            try:
                correct(bench, correction, seed, name)
            except TrainingDiverged as error:
                log.warning("%s", error)
        ctx.run.write_table(TABLE, dose_table(ctx, plan))
    return ctx.run.read_table(TABLE)


def _check(ctx: Context, corrections: list[Correction]) -> None:
    """Look at each data set once, at its largest dose."""
    seen: dict[tuple[str, ...], list[Conversation]] = {}
    for correction in sorted(corrections, key=lambda c: -(c.rows or 0)):
        if correction.data not in seen:
            seen[correction.data] = usable_rows(ctx, correction)


def dose_table(ctx: Context, plan: DosePlan) -> pd.DataFrame:
    """One row per cell that is done (or diverged), in the plan's order; see `dose_row` for the columns."""
    rows = []
    for seed, name, correction in plan.cells(ctx.config):
        folder = ctx.run.path / place_of(name, seed)
        if folder.is_dir():
            rows.append(dose_row(folder))
        elif folder.with_name(f"{folder.name}.diverged").is_dir():
            rows.append({**_head(name, seed, correction.to_dict()), "diverged": True})
    return pd.DataFrame(rows)


def dose_row(folder: Path) -> dict[str, Any]:
    """A correction's line: what was done, and the numbers of `outcome` with each interval's ends as columns.

    Columns: name, seed, data, choose_by, method, dose, rows, steps; index_minus_base, start_minus_base and feature
    (each with _ci_low, _ci_high), band_low, band_high, in_band, behaviour_back, steps_to_band, steps_to_behaviour (NaN:
    not by the end), reply_tokens, base_reply_tokens, answer_tokens (corrective), length_ratio, perplexity_ratio,
    explained_variance, base_explained_variance, notes, diverged.
    """
    spec, found = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (SPEC, OUTCOME))
    plain = {key: value for key, value in found.items() if key not in (*INTERVALS, "notes")}
    for key in INTERVALS:
        ends = {f"{key}_{end}": value for end, value in found[key].items() if end != "estimate"}
        plain |= {key: found[key]["estimate"], **ends} if "estimate" in found[key] else ends
    steps = {key: float("nan") if plain[key] is None else plain[key] for key in ("steps_to_band", "steps_to_behaviour")}
    head = _head(spec["name"], spec["seed"], spec)
    return {**head, **plain, **steps, "notes": "; ".join(found["notes"]), "diverged": False}


def _head(name: str, seed: int, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "seed": seed,
        "data": "+".join(spec["data"]),
        "choose_by": spec["choose_by"],
        "method": spec["method"],
        "dose": spec["rows"],
    }
