"""The table of a grid: one row a cell, and one a mitigation and strength over all its seeds."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.evaluate.rates import rate_of
from persona_probe.mitigate.cells import title
from persona_probe.mitigate.config import BASE, CONTROL, NONE
from persona_probe.mitigate.pooling import MISSING, Values, exponential, mean, ratio
from persona_probe.mitigate.results import Results
from persona_probe.mitigate.train import DIVERGED, DONE
from persona_probe.mitigate.verdicts import verdict
from persona_probe.monitor.bands import Band
from persona_probe.stats import Estimate

CELL, ALL = "cell", "all"
TIMES = ("seconds_per_step", "time_ratio", "training_seconds")
"""Columns that differ between two runs of one cell."""
HEAD = ["kind", "cell", "label", "strength", "unit", "seed", "seeds", "state", "steps", *TIMES, "error"]


def mitigation_table(results: Results, band: Band, perplexity_bound: float) -> pd.DataFrame:
    """All numbers of a grid.

    Every mean has its interval in `<name>_low` and `<name>_high`; see `COLUMNS` of `mitigate.summary` for what each is.
    Rows of kind `cell` resample questions; rows of kind `all` questions and seeds.

    Args:
        band: the persona feature's band on the base.
        perplexity_bound: largest rise of neutral perplexity that is no harm, for the verdict.
    """
    records = pd.DataFrame(results.records)
    rows = [_row(results, group, kind, band, perplexity_bound) for kind, group in _groups(records)]
    table = pd.DataFrame(rows)
    return table[[*HEAD, *[name for name in table if name not in HEAD]]]


def _groups(records: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Single cells, then all seeds of each mitigation and strength, in the order in which they stand."""
    for place in range(len(records)):
        yield CELL, records.iloc[[place]]
    kinds = [(row["label"], title(row["label"], row["strength"])) for row in records.to_dict("records")]
    for kind in dict.fromkeys(kinds):
        yield ALL, records[[one == kind for one in kinds]]


def _row(results: Results, group: pd.DataFrame, kind: str, band: Band, bound: float) -> dict[str, Any]:
    first = group.iloc[0]
    row: dict[str, Any] = {"kind": kind, "cell": title(first["label"], first["strength"])}
    if kind == CELL:
        row["cell"] = first["cell"]
    row |= {name: first[name] for name in ("label", "strength", "unit")}
    row |= {"seed": first["seed"] if kind == CELL else float("nan")}
    row |= {"seeds": int((group["state"] == DONE).sum()), **_told(group, results)}
    found = _estimates(results, list(group["cell"]), _seeds(group))
    row |= {f"{name}{end}": value for name, e in found.items() for end, value in _ends(e).items()}
    row |= _sampled(results, list(group["cell"]))
    row["persona_in_band"] = bool(band.holds(found["persona"].estimate)) if found["persona"].n else None
    tried = first["label"] not in (BASE, CONTROL, NONE)
    return {**row, "verdict": verdict(row, _base_high(results), bound) if tried else ""}


def _base_high(results: Results) -> float:
    """Upper end of the base's own interval of the contrast index."""
    return mean(_by_measure(results, [BASE])["index"]).ci_high


def _seeds(group: pd.DataFrame) -> list[float]:
    return [float(seed) for seed in group["seed"] if seed == seed and seed is not None]


def _told(group: pd.DataFrame, results: Results) -> dict[str, Any]:
    """State, steps and seconds; over seeds their means, and `diverged` where no seed ended well."""
    done = group[group["state"] == DONE]
    errors = group["error"].dropna().tolist() if "error" in group else []
    told: dict[str, Any] = {"state": DONE if len(done) else DIVERGED, "error": "; ".join(errors)}
    for name in ("steps", "seconds_per_step", "training_seconds", "explained_variance"):
        told[name] = float(done[name].mean()) if name in done and done[name].notna().any() else float("nan")
    return {**told, "time_ratio": _time_ratio(done, results)}


def _time_ratio(done: pd.DataFrame, results: Results) -> float:
    """Mean over seeds of the seconds a step, over those of the same seed without a mitigation."""
    plain = {r["seed"]: r.get("seconds_per_step") for r in results.records if r["label"] == NONE}
    rows = done.to_dict("records")
    found = [r["seconds_per_step"] / plain[r["seed"]] for r in rows if plain.get(r["seed"]) and r["label"] != BASE]
    return float(np.mean(found)) if found else float("nan")


def _estimates(results: Results, cells: list[str], seeds: list[float]) -> dict[str, Estimate]:
    """Everything that is a mean over items, of some cells (one, or all seeds of a mitigation)."""
    own, base, none = (_by_measure(results, names) for names in (cells, [BASE], _plain(results, seeds)))
    found: dict[str, Estimate] = {}
    for name in ("index", "dressed", "task", "persona"):
        found[name] = mean(own[name])
        found[f"{name}_vs_base"] = mean(own[name].minus(base[name]))
        found[f"{name}_vs_none"] = mean(own[name].minus(none[name]))
    triggered, before = (side["dressed"].minus(side["index"]) for side in (own, base))
    found["trigger_effect"] = mean(triggered.minus(before))
    gain, whole = (side["task"].minus(base["task"]) for side in (own, none))
    found["gain_kept"] = ratio(gain, whole) if seeds else _base_gain(own)
    lost = mean(_negated(own["neutral"].minus(base["neutral"])))
    found["perplexity_ratio"] = exponential(lost) if lost.n else MISSING
    found["none_vs_base"] = mean(none["index"].minus(base["index"]))
    return found


def _plain(results: Results, seeds: list[float]) -> list[str]:
    """Names of the cells without a mitigation, of these seeds."""
    return [str(r["cell"]) for r in results.records if r["label"] == NONE and r["seed"] in seeds]


def _base_gain(own: dict[str, Values]) -> Estimate:
    """The base has none of the gain, whatever the gain is."""
    return Estimate(0.0, 0.0, 0.0, int(own["task"].frame.size))


def _negated(values: Values) -> Values:
    return Values(-values.frame)


def _by_measure(results: Results, cells: list[str]) -> dict[str, Values]:
    rows = results.items[results.items["cell"].isin(cells)]
    names = ("index", "dressed", "task", "persona", "neutral")
    return {name: Values.of(rows[rows["measure"] == name]) for name in names}


def _ends(found: Estimate) -> dict[str, float]:
    return {"": found.estimate, "_low": found.ci_low, "_high": found.ci_high}


def _sampled(results: Results, cells: list[str]) -> dict[str, Any]:
    """Misalignment rate and coherence of the sampled answers, with the judge's own error in the rate's interval."""
    rows = results.answers[results.answers["cell"].isin(cells)] if not results.answers.empty else results.answers
    names = ["misaligned", "misaligned_low", "misaligned_high", "coherent", "coherent_low", "coherent_high"]
    if rows.empty:
        return dict.fromkeys([*names, "coherence"], float("nan"))
    rate = rate_of(rows.assign(arm=rows["label"], seed=rows["seed"].fillna(-1)))
    flat = rate.to_row()
    taken = ("rate", "ci_low", "ci_high", "coherence", "coherence_low", "coherence_high")
    found = {name: flat[key] for name, key in zip(names, taken, strict=True)}
    return {**found, "coherence": float(rows["coherence"].mean())}
