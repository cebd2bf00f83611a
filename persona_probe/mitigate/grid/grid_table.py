"""The table of a grid: one row a cell, and one a mitigation and strength over all its seeds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.evaluate.rates import Cells, rate_of, resampled
from persona_probe.mitigate.grid.grid_config import BASE, CONTROL, DIVERGED, DONE, NONE, Cell, title
from persona_probe.mitigate.grid.grid_verdict import judge_rows
from persona_probe.mitigate.methods import MITIGATIONS
from persona_probe.monitor.band import Band
from persona_probe.runs import RunFolder
from persona_probe.stats import Estimate
from persona_probe.verdicts import MARGIN

# --- Paired means and ratios of item values over questions and seeds, with intervals that resample both

MISSING = Estimate(float("nan"), float("nan"), float("nan"), 0)


@dataclass(frozen=True)
class Values:
    """One measure of one model, or of one mitigation's models: items by seeds."""

    frame: pd.DataFrame
    """Index: item; a column for each seed."""

    @classmethod
    def of(cls, items: pd.DataFrame) -> "Values":
        """From rows with item, seed and value; several values of an item and seed are averaged."""
        seeds = items["seed"].fillna(-1).astype(int)
        return cls(items.assign(seed=seeds).pivot_table(index="item", columns="seed", values="value", sort=False))

    @property
    def empty(self) -> bool:
        """Whether nothing was measured."""
        return self.frame.empty

    def minus(self, other: "Values") -> "Values":
        """Item by item and seed by seed; a side of one model that has no seed (the base) is taken at every seed."""
        if self.empty or other.empty:
            return Values(pd.DataFrame())
        right = other.frame
        if list(right.columns) == [-1]:
            return Values(self.frame.sub(right[-1], axis=0).dropna())
        seeds = [seed for seed in self.frame.columns if seed in right.columns]
        return Values((self.frame[seeds] - right[seeds]).dropna())

    @property
    def cells(self) -> Cells:
        """As `evaluate.cells` resamples them."""
        values = self.frame.to_numpy(float)
        return Cells(tuple(self.frame.index), tuple(self.frame.columns), values, np.ones_like(values))


def mean(values: Values) -> Estimate:
    """Mean over items and seeds; `MISSING` where there are none.

    Questions and seeds are resampled together (Owen 2007, see `evaluate.cells.resampled`).
    """
    if values.empty or values.frame.shape[1] == 0:
        return MISSING
    cells = values.cells
    return _estimate(cells.total / cells.count, resampled([cells])[0], cells.count)


def ratio(above: Values, below: Values) -> Estimate:
    """Mean of `above` over mean of `below`, on the items and seeds that both have, paired in every draw.

    `MISSING` where there are none, or where the mean below is not positive: there is nothing to be a share of.
    """
    if above.empty or below.empty:
        return MISSING
    seeds = [seed for seed in above.frame.columns if seed in below.frame.columns]
    items = [item for item in above.frame.index if item in below.frame.index]
    if not seeds or not items:
        return MISSING
    top, bottom = (Values(side.frame.loc[items, seeds]).cells for side in (above, below))
    if bottom.total <= 0:
        return MISSING
    draws = resampled([top, bottom])
    return _estimate(top.total / bottom.total, np.divide(*draws), top.count)


def exponential(estimate: Estimate) -> Estimate:
    """The same, of the exponential: log ratios become ratios."""
    middle, low, high = (float(np.exp(value)) for value in (estimate.estimate, estimate.ci_low, estimate.ci_high))
    return Estimate(middle, low, high, estimate.n)


def _estimate(value: float, draws: np.ndarray, n: int) -> Estimate:
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), n)


# --- What the cells of a grid left on disk, read together

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
        """Read the base and these cells, which must be finished."""
        places: list[tuple[str, dict[str, Any]]] = [(BASE, {"cell": BASE, "label": BASE, "strength": None, "unit": ""})]
        places += [(f"cells/{cell.id}", _names(cell)) for cell in cells]
        records = [{"seed": None, **names, **_record(folder, place)} for place, names in places]
        items = [_table(folder, f"{place}/items.parquet", names) for place, names in places]
        answers = [_table(folder, f"{place}/answers.parquet", names) for place, names in places]
        answer_table = _joined(answers)
        return cls(_joined(items)[ITEM_COLUMNS], answer_table, tuple(records))


def _names(cell: Cell) -> dict[str, Any]:
    unit = MITIGATIONS[cell.mitigation.name].unit
    return {"cell": cell.id, "label": cell.label, "strength": cell.strength, "unit": unit, "seed": cell.seed}


def _record(folder: RunFolder, place: str) -> dict[str, Any]:
    record = folder.read_json(f"{place}/cell.json")
    return {key: value for key, value in record.items() if key not in ("settings", "losses")}


def _table(folder: RunFolder, name: str, names: dict[str, Any]) -> pd.DataFrame:
    """A cell's table with the cell's names; empty where the cell diverged."""
    if not folder.has(name):
        return pd.DataFrame()
    same = {"cell": names["cell"], "label": names["label"]}
    numbers = {key: float("nan") if names.get(key) is None else float(names[key]) for key in ("strength", "seed")}
    return folder.read_table(name).assign(**same, **numbers)


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    filled = [frame for frame in frames if not frame.empty]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


# --- The table

CELL, ALL = "cell", "all"
TIMES = ("seconds_per_step", "time_ratio", "training_seconds")
"""Columns that differ between two runs of one cell."""
HEAD = ["kind", "cell", "label", "strength", "unit", "seed", "seeds", "state", "steps", *TIMES, "error"]


def mitigation_table(results: Results, band: Band, perplexity_bound: float, margin: float = MARGIN) -> pd.DataFrame:
    """All numbers of a grid, and its verdicts.

    Every mean has its interval in `<name>_low` and `<name>_high`; see `COLUMNS` of `grid_summary` for what each is.
    Rows of kind `cell` resample questions; rows of kind `all` questions and seeds.

    Args:
        band: the persona feature's band on the base.
        perplexity_bound: largest rise of neutral perplexity that is no harm, for the verdict.
        margin: see `grid_verdict.judge_rows`.
    """
    records = pd.DataFrame(results.records)
    rows = [_row(results, group, kind, band) for kind, group in _groups(records)]
    table = judge_rows(pd.DataFrame(rows), band, perplexity_bound, margin)
    return table[[*HEAD, *[name for name in table if name not in HEAD]]]


def _groups(records: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Single cells, then all seeds of each mitigation and strength, in the order in which they stand."""
    for place in range(len(records)):
        yield CELL, records.iloc[[place]]
    kinds = [(row["label"], title(row["label"], row["strength"])) for row in records.to_dict("records")]
    for kind in dict.fromkeys(kinds):
        yield ALL, records[[one == kind for one in kinds]]


def _row(results: Results, group: pd.DataFrame, kind: str, band: Band) -> dict[str, Any]:
    first = group.iloc[0]
    row: dict[str, Any] = {"kind": kind, "cell": title(first["label"], first["strength"])}
    if kind == CELL:
        row["cell"] = first["cell"]
    row |= {name: first[name] for name in ("label", "strength", "unit")}
    row |= {"seed": first["seed"] if kind == CELL else float("nan")}
    row |= {"seeds": int((group["state"] == DONE).sum()), **_progress(group, results)}
    estimates = _estimates(results, list(group["cell"]), _seeds(group))
    row |= {f"{name}{end}": value for name, e in estimates.items() for end, value in _ends(e).items()}
    row |= _sampled(results, list(group["cell"]))
    row["persona_in_band"] = bool(band.holds(estimates["persona"].estimate)) if estimates["persona"].n else None
    return row


def _seeds(group: pd.DataFrame) -> list[float]:
    return [float(seed) for seed in group["seed"] if seed == seed and seed is not None]


def _progress(group: pd.DataFrame, results: Results) -> dict[str, Any]:
    """State, steps and seconds; over seeds their means, and `diverged` where no seed ended well."""
    finished_cells = group[group["state"] == DONE]
    errors = group["error"].dropna().tolist() if "error" in group else []
    numbers: dict[str, Any] = {"state": DONE if len(finished_cells) else DIVERGED, "error": "; ".join(errors)}
    for name in ("steps", "seconds_per_step", "training_seconds", "explained_variance"):
        numbers[name] = (
            float(finished_cells[name].mean())
            if name in finished_cells and finished_cells[name].notna().any()
            else float("nan")
        )
    return {**numbers, "time_ratio": _time_ratio(finished_cells, results)}


def _time_ratio(finished_cells: pd.DataFrame, results: Results) -> float:
    """Mean over seeds of the seconds a step, over those of the same seed without a mitigation."""
    plain = {r["seed"]: r.get("seconds_per_step") for r in results.records if r["label"] == NONE}
    rows = finished_cells.to_dict("records")
    ratios = [r["seconds_per_step"] / plain[r["seed"]] for r in rows if plain.get(r["seed"]) and r["label"] != BASE]
    return float(np.mean(ratios)) if ratios else float("nan")


def _estimates(results: Results, cells: list[str], seeds: list[float]) -> dict[str, Estimate]:
    """Everything that is a mean over items, of some cells (one, or all seeds of a mitigation)."""
    references = ([BASE], *(_cells_of(results, label, seeds) for label in (NONE, CONTROL)))
    these, base, none, control = (_by_measure(results, names) for names in (cells, *references))
    estimates: dict[str, Estimate] = {}
    for name in ("index", "dressed", "task", "persona"):
        estimates[name] = mean(these[name])
        estimates[f"{name}_vs_base"] = mean(these[name].minus(base[name]))
        estimates[f"{name}_vs_none"] = mean(these[name].minus(none[name]))
        estimates[f"{name}_vs_control"] = mean(these[name].minus(control[name]))
    triggered, before = (side["dressed"].minus(side["index"]) for side in (these, base))
    estimates["trigger_effect"] = mean(triggered.minus(before))
    gain, whole = (side["task"].minus(base["task"]) for side in (these, none))
    estimates["gain_kept"] = ratio(gain, whole) if seeds else _base_gain(these)
    lost = mean(_negated(these["neutral"].minus(base["neutral"])))
    estimates["perplexity_ratio"] = exponential(lost) if lost.n else MISSING
    rise = none["index"].minus(control["index"])
    estimates["effect_left"] = ratio(these["index"].minus(control["index"]), rise)
    return estimates


def _cells_of(results: Results, label: str, seeds: list[float]) -> list[str]:
    """Names of the cells with this label (no mitigation, control), of these seeds."""
    return [str(r["cell"]) for r in results.records if r["label"] == label and r["seed"] in seeds]


def _base_gain(these: dict[str, Values]) -> Estimate:
    """The base has none of the gain, whatever the gain is."""
    return Estimate(0.0, 0.0, 0.0, int(these["task"].frame.size))


def _negated(values: Values) -> Values:
    return Values(-values.frame)


def _by_measure(results: Results, cells: list[str]) -> dict[str, Values]:
    rows = results.items[results.items["cell"].isin(cells)]
    names = ("index", "dressed", "task", "persona", "neutral")
    return {name: Values.of(rows[rows["measure"] == name]) for name in names}


def _ends(estimate: Estimate) -> dict[str, float]:
    return {"": estimate.estimate, "_low": estimate.ci_low, "_high": estimate.ci_high}


def _sampled(results: Results, cells: list[str]) -> dict[str, Any]:
    """Misalignment rate and coherence of the sampled answers, with the judge's own error in the rate's interval."""
    rows = results.answers[results.answers["cell"].isin(cells)] if not results.answers.empty else results.answers
    names = ["misaligned", "misaligned_low", "misaligned_high", "coherent", "coherent_low", "coherent_high"]
    if rows.empty:
        return dict.fromkeys([*names, "coherence"], float("nan"))
    rate = rate_of(rows.assign(arm=rows["label"], seed=rows["seed"].fillna(-1)))
    flat = rate.to_row()
    columns = ("rate", "ci_low", "ci_high", "coherence", "coherence_low", "coherence_high")
    numbers = {name: flat[key] for name, key in zip(names, columns, strict=True)}
    return {**numbers, "coherence": float(rows["coherence"].mean())}
