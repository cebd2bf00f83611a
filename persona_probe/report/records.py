"""What a run folder holds, as tables and dictionaries. Reading it needs no model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.table import contrast_rows, judged_rows
from persona_probe.report.arms import Arms
from persona_probe.report.files import read_json, read_lines, read_table
from persona_probe.report.labelled import LabelledRuns
from persona_probe.stats import Estimate

COLUMNS: dict[str, tuple[str, ...]] = {
    "readings": (
        *("arm", "seed", "step", "feature", "latent", "mean", "ci_low", "ci_high", "maximum", "firing_rate"),
        *("explained_variance", "l0", "residual_norm", "n_probes", "base_mean", "base_sd"),
    ),
    "evals": ("arm", "seed", "step", "split", "item", "category", "aligned_logprob", "misaligned_logprob", "value"),
    "latents": (
        *("latent", "rise", "rise_ci_low", "rise_ci_high", "rise_base", "firing_base", "firing_incorrect"),
        *("firing_correct", "cosine", "decoder_norm", "rank", "kind", "effect_base", "effect_base_low"),
        *("effect_base_high", "effect_organism", "effect_organism_low", "effect_organism_high", "strength"),
        *("persona", "label"),
    ),
    "steering": (
        *("model", "kind", "name", "latent", "strength", "unit", "estimate", "ci_low", "ci_high", "delta"),
        *("perplexity_ratio", "within_bound"),
    ),
}
"""Columns that each parquet file of a run folder must have (more are allowed)."""
OPTIONAL: dict[str, tuple[str, ...]] = {
    "agreement": ("left", "right", "top", "shared", "share", "chance", "spearman", "alive"),
    "planted": ("plant", "kind", "size", "ranker", "recall_1", "false_share"),
    "sizes": (
        *("model", "parameters", "arm", "seed", "rate", "rate_low", "rate_high"),
        *("incoherent", "incoherent_low", "incoherent_high", "n"),
    ),
    "mitigations": (),
    "screening": ("data", "seed", "score", "shift"),
    "doses": (),
    "stress": (),
}
"""Tables that not every folder holds: `agreement` of a study, the others of a collection of runs."""
LABELLED = "monitor-study"
"""`kind` in the manifest of a labelled study's folder."""


def _empty(table: str) -> Callable[[], pd.DataFrame]:
    return lambda: pd.DataFrame(columns=list((COLUMNS | OPTIONAL)[table]))


@dataclass(frozen=True)
class Records:
    """Everything that figures and the report draw from. What a stage has not written yet is empty."""

    readings: pd.DataFrame = field(default_factory=_empty("readings"))
    """One row per arm, seed, step and feature."""
    evals: pd.DataFrame = field(default_factory=_empty("evals"))
    """One row per contrast item, arm, seed and step; `value` in nats per token."""
    judged: pd.DataFrame = field(default_factory=lambda: judged_rows(pd.DataFrame()))
    """One row per judged answer; `value` is 1 for misaligned, 0 for not, NaN where it does not count."""
    latents: pd.DataFrame = field(default_factory=_empty("latents"))
    """One row per ranked latent; causal effects in nats per token, NaN where not tested."""
    steering: pd.DataFrame = field(default_factory=_empty("steering"))
    """One row per model, direction and signed strength."""
    agreement: pd.DataFrame = field(default_factory=_empty("agreement"))
    """One row per pair of rankers: shared top latents and rank correlation."""
    planted: pd.DataFrame = field(default_factory=_empty("planted"))
    """One row per plant and ranker of `persona-probe bench planted`."""
    sizes: pd.DataFrame = field(default_factory=_empty("sizes"))
    """One row per model, arm and seed: parameters (a count), misaligned and incoherent shares with their intervals."""
    mitigations: pd.DataFrame = field(default_factory=_empty("mitigations"))
    """One row per cell of a mitigation grid."""
    screening: pd.DataFrame = field(default_factory=_empty("screening"))
    """One row per training run: mean score of its rows, and the shift of the contrast index (nats per token)."""
    doses: pd.DataFrame = field(default_factory=_empty("doses"))
    """One row per cell of a grid of corrections."""
    stress: pd.DataFrame = field(default_factory=_empty("stress"))
    """One row per number of a stress test, all repairs of a study below each other; `repair` is the repair's folder."""
    labelled: LabelledRuns = field(default_factory=LabelledRuns)
    """Runs of a labelled study, with shares of bad data."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Sampled answers (untrusted model text)."""
    cards: list[dict[str, Any]] = field(default_factory=list)
    """Feature cards: tokens and examples (untrusted model text)."""
    summary: dict[str, Any] = field(default_factory=dict)
    """The study's key numbers."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """How the study was run: config, versions, seeds, hashes."""

    @cached_property
    def arms(self) -> Arms:
        """The study's arms, as the manifest's config names them."""
        return Arms.from_manifest(self.manifest)


def load_records(folder: str | Path) -> Records:
    """Read a run folder, or the folder of a labelled study (manifest: `"kind": "monitor-study"`) or of other results.

    Files that no stage has written yet give empty tables, lists and dictionaries.

    Raises:
        InputError: no manifest.json in `folder`, a file that cannot be read, a missing column, an arm that the
            manifest's config does not name.
    """
    root = Path(folder)
    if not (root / "manifest.json").is_file():
        raise InputError(f"{root} is not a run folder (no manifest.json): give the folder that a study wrote")
    manifest = read_json(root / "manifest.json", dict)
    if manifest.get("kind") == LABELLED:
        return Records(labelled=_labelled(root, manifest), manifest=manifest)
    every = COLUMNS | OPTIONAL
    tables: dict[str, Any] = {name: read_table(root / f"{name}.parquet", columns) for name, columns in every.items()}
    tables |= _repairs(root)
    evals = tables.pop("evals")
    records = Records(
        **tables,
        evals=contrast_rows(evals),
        judged=judged_rows(evals),
        samples=read_lines(root / "samples.jsonl"),
        cards=read_json(root / "cards.json", list),
        summary=read_json(root / "summary.json", dict),
        manifest=manifest,
    )
    for name, table in (("readings", records.readings), ("evals", evals)):
        _check_arms(f"{name}.parquet", table, records.arms)
    return records


def _repairs(root: Path) -> dict[str, pd.DataFrame]:
    """The tables of `realign RUN --plan` and `--stress`, which lie below `realign/`."""
    paths = sorted(root.glob("realign/*/stress.parquet"))
    found = [read_table(path, OPTIONAL["stress"]).assign(repair=path.parent.name) for path in paths]
    stress = pd.concat(found, ignore_index=True) if found else pd.DataFrame()
    return {"doses": read_table(root / "realign" / "doses.parquet", OPTIONAL["doses"]), "stress": stress}


def _labelled(root: Path, manifest: dict[str, Any]) -> LabelledRuns:
    readings = read_table(root / "readings.parquet", ("run", "step", "feature", "mean", "base_mean", "base_sd"))
    evals = read_table(root / "evals.parquet", ("run", "step", "item", "value"))
    return LabelledRuns(readings, evals, read_json(root / "results.json", dict), manifest.get("config") or {})


def _check_arms(name: str, table: pd.DataFrame, arms: Arms) -> None:
    for arm in table["arm"].unique():
        if arm not in arms.names:
            raise unknown(f"arm in {name}", arm, arms.names)


def as_estimate(raw: object) -> Estimate | None:
    """An `Estimate` from the summary's JSON; None where there is no number, NaN ends where there is no interval."""
    if not isinstance(raw, Mapping):
        return None
    estimate, low, high = (_number(raw.get(key)) for key in ("estimate", "ci_low", "ci_high"))
    return None if math.isnan(estimate) else Estimate(estimate, low, high, int(raw.get("n") or 0))


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan
