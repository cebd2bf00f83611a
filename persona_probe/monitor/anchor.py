"""What readings are compared with: the base model's mean and spread of every feature."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from persona_probe.errors import InputError
from persona_probe.monitor.bands import Band
from persona_probe.monitor.events import Start, from_line
from persona_probe.monitor.reading import Snapshot

log = logging.getLogger(__name__)

BASE_KEY = "base_explained_variance"
"""Key of `Start.metadata` that holds the base's explained variance."""


@dataclass(frozen=True)
class Anchor:
    """The base model's readings, in numbers."""

    mean: dict[str, float]
    sd: dict[str, float]
    """Standard deviation between probes."""
    explained_variance: float = math.nan
    """Of the SAE on the base's probes; NaN where there is no SAE, or it is not known."""

    @classmethod
    def of(cls, snapshot: Snapshot) -> "Anchor":
        """The anchor that a reading of the base model gives."""
        columns = dict(zip(snapshot.names, snapshot.values.T, strict=True))
        spread = {n: float(c.std(ddof=1)) if len(c) > 1 else 0.0 for n, c in columns.items()}
        return cls({n: float(c.mean()) for n, c in columns.items()}, spread, snapshot.fit.explained_variance)

    def bands(self, width_sd: float) -> dict[str, tuple[float, float]]:
        """Feature name to its base band, mean +- `width_sd` standard deviations; none where the base is not finite."""
        bands = {n: Band(m - width_sd * self.sd[n], m + width_sd * self.sd[n]) for n, m in self.mean.items()}
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
        found = recorded(Path(base))
        if found is None:
            raise InputError(f"no base in {base}: give the JSONL file that a FeatureMonitor wrote (path=)")
        base = found[0]
    if lacking := [n for n in names if n not in base.mean]:
        raise InputError(f"the base has no reading of {lacking[0]!r}: it has {', '.join(base.mean)}")
    return Anchor({n: base.mean[n] for n in names}, {n: base.sd[n] for n in names}, base.explained_variance)


def recorded(path: Path) -> tuple[Anchor, str] | None:
    """The base of the latest start in an event file, and what it was read on (`fingerprint`); None where there is none.

    A torn last line is passed over: a run that was killed leaves one.
    """
    if not path.is_file():
        return None
    found = None
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = from_line(line)
            except ValueError:
                continue
            if isinstance(event, Start) and (base := event.metadata.get("base")):
                explained = event.metadata.get(BASE_KEY)
                fit = math.nan if explained is None else float(explained)
                anchor = Anchor(_floats(base["mean"]), _floats(base["sd"]), fit)
                found = anchor, str(event.metadata.get("fingerprint"))
    return found


def fingerprint(parts: Mapping[str, object]) -> str:
    """A short hash of what the base was read on: probes, positions, layer, features."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _floats(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in values.items()}
