"""What the cells of a grid left on disk, read together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from persona_probe.finetune.mitigations import MITIGATIONS
from persona_probe.mitigate.cells import Cell
from persona_probe.mitigate.config import BASE
from persona_probe.runs import RunFolder

ITEM_COLUMNS = ["cell", "label", "strength", "seed", "measure", "item", "value"]


@dataclass(frozen=True)
class Results:
    """All cells' numbers, item by item."""

    items: pd.DataFrame
    """Columns `ITEM_COLUMNS`; the base has label `base`, and neither strength nor seed."""
    answers: pd.DataFrame
    """Judged answers with the columns cell, label, strength and seed; empty where none were sampled."""
    records: tuple[dict[str, Any], ...]
    """One a cell: cell, label, strength, unit, seed, state, and for what was trained steps and seconds."""

    @classmethod
    def read(cls, folder: RunFolder, cells: Sequence[Cell]) -> "Results":
        """Read the base and these cells, which must be there."""
        places: list[tuple[str, dict[str, Any]]] = [(BASE, {"cell": BASE, "label": BASE, "strength": None, "unit": ""})]
        places += [(f"cells/{cell.id}", _names(cell)) for cell in cells]
        records = [{"seed": None, **names, **_record(folder, place)} for place, names in places]
        items = [_table(folder, f"{place}/items.parquet", names) for place, names in places]
        answers = [_table(folder, f"{place}/answers.parquet", names) for place, names in places]
        joined = _joined(answers)
        return cls(_joined(items)[ITEM_COLUMNS], joined, tuple(records))


def _names(cell: Cell) -> dict[str, Any]:
    unit = MITIGATIONS[cell.mitigation.name].unit
    return {"cell": cell.id, "label": cell.label, "strength": cell.strength, "unit": unit, "seed": cell.seed}


def _record(folder: RunFolder, place: str) -> dict[str, Any]:
    held = folder.read_json(f"{place}/cell.json")
    return {key: value for key, value in held.items() if key not in ("settings", "losses")}


def _table(folder: RunFolder, name: str, names: dict[str, Any]) -> pd.DataFrame:
    """A cell's table with the cell's names; empty where the cell diverged."""
    if not folder.has(name):
        return pd.DataFrame()
    same = {"cell": names["cell"], "label": names["label"]}
    numbers = {key: float("nan") if names.get(key) is None else float(names[key]) for key in ("strength", "seed")}
    return folder.read_table(name).assign(**same, **numbers)


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    kept = [frame for frame in frames if not frame.empty]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame()
