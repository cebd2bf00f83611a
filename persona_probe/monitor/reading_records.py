"""From a snapshot to a reading: intervals, the base that it is compared with, and the numbers of the training step."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from persona_probe.errors import InputError
from persona_probe.files import as_damaged, is_there, regular_file
from persona_probe.monitor.band import Band
from persona_probe.monitor.events import BASE_KEY, FeatureValue, Reading, Start, from_line
from persona_probe.monitor.reading import Snapshot
from persona_probe.saes.read import FitMoments
from persona_probe.stats import FEW_CLUSTERS, bootstrap_columns
from persona_probe.writing import write_table

# --- What readings are compared with: the base model's mean and spread of every feature


@dataclass(frozen=True)
class Anchor:
    """The base model's readings, in numbers."""

    mean: dict[str, float]
    sd: dict[str, float]
    """Standard deviation between probes."""
    explained_variance: float = math.nan
    """Of the SAE on the base's probes; NaN where there is no SAE, or it is not known."""
    center: Float[np.ndarray, " d_model"] | None = field(default=None, compare=False)
    """Mean activations where directions are read, see `Snapshot`; None where they are not known."""

    @classmethod
    def of(cls, snapshot: Snapshot) -> "Anchor":
        """The anchor that a reading of the base model gives."""
        columns = dict(zip(snapshot.names, snapshot.values.T, strict=True))
        spread = {n: float(c.std(ddof=1)) if len(c) > 1 else 0.0 for n, c in columns.items()}
        means = {n: float(c.mean()) for n, c in columns.items()}
        return cls(means, spread, snapshot.fit.explained_variance, snapshot.center)

    def chance(self, snapshot: Snapshot) -> float:
        """By how much a random unit direction has moved from the base: root mean square over all directions.

        The mean projection on a unit direction moves by its product with the mean activations' shift; over all
        directions that is the shift's norm, divided by the square root of the width.
        """
        if self.center is None or snapshot.center is None or self.center.shape != snapshot.center.shape:
            return math.nan
        return float(np.linalg.norm(snapshot.center - self.center) / math.sqrt(len(self.center)))

    def bands(self, width_sd: float) -> dict[str, tuple[float, float]]:
        """Feature name to its base band, mean +- `width_sd` standard deviations; none where the base is not finite."""
        bands = {n: Band.of(m, self.sd[n], width_sd) for n, m in self.mean.items()}
        return {n: (b.low, b.high) for n, b in bands.items() if math.isfinite(b.low) and math.isfinite(b.high)}

    def record(self) -> dict[str, dict[str, float]]:
        """As plain JSON, for `Start.metadata["base"]`."""
        return {"mean": self.mean, "sd": self.sd}


def anchor_from(base: "Anchor | Snapshot | str | Path", names: tuple[str, ...]) -> Anchor:
    """The anchor that a user gives: a snapshot of the base model, or the event file of an earlier run.

    Raises:
        InputError: no such file, no base in it, or a base without these features.
    """
    if isinstance(base, Snapshot):
        base = Anchor.of(base)
    if not isinstance(base, Anchor):
        earlier = recorded(Path(base))
        if earlier is None:
            raise InputError(f"no base in {base}: give the JSONL file that a FeatureMonitor wrote (path=)")
        base = earlier[0]
    if lacking := [n for n in names if n not in base.mean]:
        raise InputError(f"the base has no reading of {lacking[0]!r}: it has {', '.join(base.mean)}")
    return replace(base, mean={n: base.mean[n] for n in names}, sd={n: base.sd[n] for n in names})


def recorded(path: Path) -> tuple[Anchor, str] | None:
    """The base of the latest start in an event file, and the `fingerprint` of what it was read on; None without a base.

    A torn last line, which a killed run leaves, is skipped.
    """
    if not is_there(path):
        return None
    regular_file(path)
    latest = None
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = from_line(line)
            except ValueError:
                continue
            with as_damaged(path, "train with another path="):
                if isinstance(event, Start) and (base := event.metadata.get("base")):
                    explained = event.metadata.get(BASE_KEY)
                    fit = math.nan if explained is None else float(explained)
                    anchor = Anchor(_floats(base["mean"]), _floats(base["sd"]), fit)
                    latest = anchor, str(event.metadata.get("fingerprint"))
    return latest


def fingerprint(parts: Mapping[str, object]) -> str:
    """A short hash of what the base was read on: probes, positions, layer, features."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _floats(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


# --- From a snapshot to a reading

DRAWS = 2000
"""As in `stats.bootstrap_mean`."""


@dataclass(frozen=True)
class StepInfo:
    """What a reading holds of its training step besides the features."""

    loss: float | None = None
    learning_rate: float | None = None
    tokens_seen: int | None = None


def make_reading(
    snapshot: Snapshot, anchor: Anchor, *, step: int, mode: str, seconds: float, info: StepInfo
) -> Reading:
    """The reading of a snapshot. A model that diverged gives NaN, not an error."""
    low, high = intervals(snapshot.values)
    mean, chance = snapshot.values.mean(axis=0), anchor.chance(snapshot)
    values = tuple(
        FeatureValue(
            name=name,
            latent=snapshot.latents[i],
            mean=float(mean[i]),
            ci_low=float(low[i]),
            ci_high=float(high[i]),
            maximum=float(snapshot.maximum[i]),
            firing_rate=float(snapshot.firing[i]),
            base_mean=anchor.mean[name],
            base_sd=anchor.sd[name],
            sae=snapshot.saes[i] if snapshot.saes else "",
            chance=chance if snapshot.latents[i] < 0 else math.nan,
        )
        for i, name in enumerate(snapshot.names)
    )
    fit = snapshot.fit
    return Reading(
        step=step,
        mode=mode,
        features=values,
        explained_variance=fit.explained_variance if math.isfinite(fit.error) else math.nan,
        l0=fit.l0,
        residual_norm=fit.residual_norm,
        n_probes=len(snapshot.values),
        seconds=seconds,
        loss=info.loss,
        learning_rate=info.learning_rate,
        tokens_seen=info.tokens_seen,
        fits={sae: _fit_numbers(fit) for sae, fit in snapshot.fits.items()},
        finite=snapshot.finite and bool(np.isfinite(snapshot.values).all()),
    )


def _fit_numbers(fit: FitMoments) -> dict[str, float]:
    explained = fit.explained_variance if math.isfinite(fit.error) else math.nan
    return {"explained_variance": explained, "l0": fit.l0, "residual_norm": fit.residual_norm}


def intervals(
    values: Float[np.ndarray, "items columns"],
) -> tuple[Float[np.ndarray, " columns"], Float[np.ndarray, " columns"]]:
    """95% intervals of all columns' means: those of `stats.bootstrap_mean`, from the same draws, or t for few items.

    A column that is not finite gets NaN.
    """
    # `stats.bootstrap_columns` draws otherwise (`multinomial`), so its ends differ a little. A monitor's intervals must
    # equal those of `track`, which are `bootstrap_mean`'s.
    finite = np.isfinite(values).all(axis=0)
    if len(values) < FEW_CLUSTERS:
        low, high = bootstrap_columns(np.where(finite, values, 0.0))
        return np.where(finite, low, np.nan), np.where(finite, high, np.nan)
    weights = _weights(len(values))
    means = weights @ np.where(finite, values, 0.0)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return np.where(finite, low, np.nan), np.where(finite, high, np.nan)


@lru_cache(maxsize=4)
def _weights(n: int) -> Float[np.ndarray, "draws items"]:
    """How often each of n items is drawn, divided by n; the draws depend on n alone, so they are made once."""
    draws = np.random.default_rng(0).integers(0, n, size=(DRAWS, n))
    counts = np.zeros((DRAWS, n))
    np.add.at(counts, (np.arange(DRAWS)[:, None], draws), 1.0)
    return counts / n


# --- Prompt-level values of every reading: on disk, since memory holds the latest only


def write_values(folder: Path, snapshot: Snapshot, mode: str, step: int) -> Path:
    """Write `<mode>-<step>.parquet`: one row per probe (or kept sequence), one float32 column per feature.

    The file is written whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    frame = pd.DataFrame(snapshot.values.astype("float32"), columns=list(snapshot.names))
    return write_table(folder / f"{mode}-{step:08d}.parquet", frame)
