"""Selections that several figures share: last steps, evaluation items, the persona latent."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.report.records import Records, as_estimate
from persona_probe.stats import Estimate, bootstrap_mean

PERSONA = "persona"
"""Name of the persona feature in `readings`."""


def evaluation(records: Records) -> pd.DataFrame:
    """Contrast items that did not help to choose a latent."""
    return where(records.evals, split="evaluation")


def where(frame: pd.DataFrame, **equals: object) -> pd.DataFrame:
    """Rows whose columns have these values."""
    keep = np.ones(len(frame), dtype=bool)
    for column, value in equals.items():
        keep &= (frame[column] == value).to_numpy(dtype=bool)
    return frame.loc[keep]


def numbers(frame: pd.DataFrame, column: str) -> np.ndarray:
    """A column as float64, with NaN for what is missing."""
    return frame[column].to_numpy(dtype=float, na_value=np.nan)


def flags(frame: pd.DataFrame, column: str) -> np.ndarray:
    """A column of true and false, with false for what is missing."""
    return frame[column].fillna(False).to_numpy(dtype=bool)


def distinct(frame: pd.DataFrame, column: str) -> list[Any]:
    """Different values of a column, sorted, without the missing."""
    return sorted(set(frame[column].dropna().tolist()))


def groups(frame: pd.DataFrame, *columns: str) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Key tuple and rows of each group, sorted by key; rows with a missing key are left out."""
    for key, group in frame.groupby(list(columns)):
        yield tuple(key) if isinstance(key, tuple) else (key,), group


def last_step(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows at the last step of each arm and seed."""
    if frame.empty:
        return frame
    return frame.loc[frame["step"] == frame.groupby(["arm", "seed"], dropna=False)["step"].transform("max")]


def over_items(frame: pd.DataFrame) -> Estimate:
    """Mean contrast index (nats per token) of rows of `evals`, with an interval clustered by item."""
    return bootstrap_mean(numbers(frame, "value"), frame["item"].tolist())


def contrast_index(records: Records, arm: str) -> Estimate | None:
    """An arm's contrast index at its last step: the summary's, else computed from the evaluation items."""
    stated = as_estimate(mapping(records.summary.get("contrast_index")).get(arm))
    if stated is not None:
        return stated
    rows = last_step(where(evaluation(records), arm=arm))
    return None if rows.empty else over_items(rows)


def base_band(records: Records) -> tuple[float, float] | None:
    """The interval that the persona feature keeps on the base model and the control arm."""
    band = mapping(records.summary.get("base_band"))
    low, high = band.get("low"), band.get("high")
    return None if low is None or high is None else (float(low), float(high))


def persona_latent(records: Records) -> int | None:
    """Index of the latent that the study named its persona feature."""
    latent = mapping(records.summary.get("persona_feature")).get("latent")
    if latent is not None:
        return int(latent)
    named = distinct(records.latents.loc[flags(records.latents, "persona")], "latent")
    return int(named[0]) if named else None


def item_count(frame: pd.DataFrame) -> int:
    """Number of different contrast items."""
    return len(distinct(frame, "item"))


def seed_count(frame: pd.DataFrame) -> str:
    """`1 seed`, `3 seeds`."""
    n = len(distinct(frame, "seed"))
    return f"{n} seed" if n == 1 else f"{n} seeds"


def mapping(value: object) -> Mapping[str, Any]:
    """A dictionary of the summary; an empty one where the key is missing or null."""
    return value if isinstance(value, Mapping) else {}
