"""The whole grid: every cell in turn, then the table, the verdicts and the figure."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.evaluate.rulings import AnswerJudge
from persona_probe.mitigate.cells import Cell, cells_of
from persona_probe.mitigate.config import BASE, Grid
from persona_probe.mitigate.lab import Lab
from persona_probe.mitigate.results import Results
from persona_probe.mitigate.summary import summarise
from persona_probe.mitigate.table import mitigation_table
from persona_probe.mitigate.train import DIVERGED, check_same, measure_base, run_cell
from persona_probe.report.export import export_figures
from persona_probe.report.figures.mitigations import NAME as FIGURE
from persona_probe.report.records import load_records
from persona_probe.runs import write_atomic

log = logging.getLogger(__name__)
TABLE = "mitigations.parquet"


@dataclass(frozen=True)
class Outcome:
    """What a grid has so far."""

    table: pd.DataFrame
    """One row a cell (`kind` "cell"), and one a mitigation and strength over all seeds (`kind` "all")."""
    summary: dict[str, Any]
    """What summary.json holds."""
    missing: tuple[str, ...]
    """Cells that are still to be trained."""


def run_grid(
    grid: Grid,
    out: Path,
    device: str | None = None,
    run: Path | None = None,
    only: Sequence[str] | None = None,
    judge: AnswerJudge | None = None,
) -> Outcome:
    """Train and measure the cells that are not in the folder yet, then write tables; a stopped grid goes on.

    Args:
        grid: see `mitigate.config`.
        out: the grid's folder.
        device: instead of the study's.
        run: the located run, instead of the grid's own.
        only: labels or names of mitigations to train now, with the cells without a mitigation.
        judge: rules on sampled answers, instead of the packaged offline judge.

    Raises:
        InputError: an unknown mitigation, a run without locate, rows that overlap what is evaluated, a mitigation
            that lacks something, or a folder of other settings. All of it before anything is trained.
    """
    every, wanted = cells_of(grid), cells_of(grid, only)
    lab = Lab(grid, out, device, run, judge)
    if grid.answers is not None:
        _ = lab.judge  # one that is not to be had is told now, not after an hour
    there = [cell for cell in every if lab.folder.has(f"cells/{cell.id}")]
    for cell in there:
        check_same(lab, cell)
    measure_base(lab)
    for cell in wanted:
        cell.mitigation.check(lab.ground)
    for cell in wanted:
        run_cell(lab, cell)
    return write_results(lab, every)


def write_results(lab: Lab, cells: Sequence[Cell]) -> Outcome:
    """Write items.parquet, mitigations.parquet and .csv, summary.json and the figure, of the cells that are there."""
    there = [cell for cell in cells if lab.folder.has(f"cells/{cell.id}")]
    results = Results.read(lab.folder, there)
    table = mitigation_table(results, lab.band, lab.grid.perplexity_bound)
    missing = tuple(cell.id for cell in cells if cell not in there)
    head = {"grid": lab.grid.name, "model": lab.ctx.config.model, "sae": lab.ctx.config.sae}
    head |= {"persona_latent": lab.latents[0], "seeds": list(lab.grid.seeds)}
    summary = {**head, **summarise(table, missing), "seconds": lab.folder.manifest["seconds"]}
    lab.folder.write_table("items.parquet", results.items)
    if not results.answers.empty:
        lab.folder.write_table("answers.parquet", results.answers)
    lab.folder.write_table(TABLE, table)
    write_atomic(lab.folder.path / "mitigations.csv", table.to_csv(index=False))
    lab.folder.write_json("summary.json", summary)
    export_figures(load_records(lab.folder.path), lab.folder.path / "figures", only=[FIGURE])
    diverged = [cell["cell"] for cell in results.records if cell["state"] == DIVERGED]
    log.info("%d cells, %d diverged, %d missing; base measured in %s", len(there), len(diverged), len(missing), BASE)
    return Outcome(table, summary, missing)
