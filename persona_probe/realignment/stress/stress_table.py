"""The one table that all stress tests write, and what they have in common."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd

from persona_probe.stats import Estimate

NATS, TOKENS, SHARE = "nats/token", "tokens", "share"
COLUMNS = (
    *("test", "quantity", "model", "seed", "step", "estimate", "ci_low", "ci_high", "n", "reference", "unit", "shown"),
)
"""`reference`: what the estimate would be without an effect; `shown`: whether the figure draws the row."""

Row = dict[str, Any]


class StressResult(Protocol):
    """What a stress test returns."""

    def to_rows(self) -> list[Row]:
        """Rows of stress.parquet."""
        ...

    def statement(self) -> str:
        """What came out, in words with its numbers."""
        ...


def row(
    test: str,
    quantity: str,
    model: str,
    value: Estimate | float,
    *,
    seed: int = -1,
    step: int = -1,
    reference: float = 0.0,
    unit: str = NATS,
    shown: bool = False,
) -> Row:
    """One row; a plain number has no interval. Seed and step are -1 where they do not apply."""
    whole = value if isinstance(value, Estimate) else Estimate(float(value), np.nan, np.nan, 0)
    cells = (test, quantity, model, seed, step, whole.estimate, whole.ci_low, whole.ci_high, whole.n)
    return dict(zip(COLUMNS, (*cells, reference, unit, shown), strict=True))


def as_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows with the table's columns, also if there are no rows."""
    return pd.DataFrame(list(rows), columns=list(COLUMNS))


def moved(effect: Estimate, up: str, down: str, neither: str) -> str:
    """One of three words, by the interval."""
    if not effect.excludes_zero:
        return neither
    return up if effect.estimate > 0 else down
