"""What a grid would do, and about how long it takes, without training anything."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from persona_probe.mitigate.cells import Cell, cells_of
from persona_probe.mitigate.config import Grid
from persona_probe.runs import RunFolder

MEASURES = 4
"""Measuring a cell takes about so many times as long as tracking one checkpoint: more items, probes, answers."""
EDGES = 2
"""Characters of a table's own edges."""


def plan_lines(grid: Grid, out: Path, run: Path | None = None, only: Sequence[str] | None = None) -> list[str]:
    """One line a cell, and an estimate of the time for those that are not there yet.

    Raises:
        InputError: an unknown mitigation, or no run folder where the grid's study should be.
    """
    cells, study = cells_of(grid, only), RunFolder.open(run or grid.run)
    there = {cell.id for cell in cells if (out / "cells" / cell.id / "cell.json").is_file()}
    lines = [f"{cell.id}: {'done' if cell.id in there else _what(cell, grid)}" for cell in cells]
    todo = len(cells) - len(there)
    return [*lines, f"{len(cells)} cells, {todo} to train; {_time(_seconds(grid, study, out), todo)}"]


def _what(cell: Cell, grid: Grid) -> str:
    unit = f", {cell.mitigation.unit} {cell.strength:g}" if cell.strength is not None else ""
    return f"{grid.training.steps} steps of {grid.training.batch_size} rows, seed {cell.seed}{unit}"


def _time(found: tuple[float, str] | None, todo: int) -> str:
    if found is None:
        return "no time known: neither this grid nor its study has trained anything yet"
    return f"about {found[0] * todo / 60:.0f} minutes, at {found[0]:.0f} s a cell ({found[1]})"


def _seconds(grid: Grid, study: RunFolder, out: Path) -> tuple[float, str] | None:
    """Seconds a cell: from this grid's cells, else from what the study took for its own training and tracking."""
    held = RunFolder(out).manifest if (out / "manifest.json").is_file() else {}
    own = [value for key, value in held.get("seconds", {}).items() if key.startswith("cells/")]
    if own:
        return sum(own) / len(own), f"the mean of the {len(own)} cells that are done"
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


def show_tables(rows: Sequence[dict[str, str]], headings: dict[str, str], name: str, width: int) -> Iterator[Any]:
    """The grid's table for a terminal, by rich; in a narrow one as several, each with the first column.

    Args:
        width: characters that a line has; an interval stands below its estimate.
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
        yield _table(f"mitigations, {name}", {key: headings[key] for key in part}, cells)


def _table(title: str, headings: dict[str, str], cells: dict[str, list[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in headings.values():
        table.add_column(heading, overflow="fold")
    for row in zip(*(cells[key] for key in headings), strict=True):
        table.add_row(*map(Text, row))
    return table
