"""A rule on features that leave their band."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from persona_probe.errors import InputError
from persona_probe.monitor.band import Band, beyond_chance
from persona_probe.monitor.events import FeatureValue, Reading, Start
from persona_probe.monitor.rules.rule import (
    Comparison,
    SidedRule,
    SubjectState,
    check_count,
    check_known,
    in_a_row,
    positive,
    shifted,
)

BAND_SD = 0.5
"""Half-width in base standard deviations where the monitor gives no band; the monitor's default."""
ROUNDING = 1e-6
"""Relative tolerance at a band's ends: a base that does not vary has a band of no width."""


@dataclass(frozen=True, eq=False)
class OutsideBand(SidedRule):
    """Fires when a feature's mean was outside its band for `k` readings in a row.

    The band is the first of these that exists: the feature's in `bands`; base mean +- `band_sd` base standard
    deviations, if `band_sd` is not None; the monitor's base band; base mean +- `BAND_SD`. A latent that is silent on
    the base has a band of zero width, so its first activity counts as outside.

    Training moves every direction. So where the band is a default (neither `bands` nor `band_sd`), a direction must
    also have moved `CHANCE` times what random directions in the same place did.

    Raises:
        InputError: `k` below 1, a width that is not positive, a band that is upside down, or bands of unknown features.
    """

    k: int = 2
    band_sd: float | None = None
    """Half-width in base standard deviations."""
    bands: Mapping[str, tuple[float, float]] | None = None
    """Feature name to (low, high) in the feature's units, for example calibrated on benign runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k)
        if self.band_sd is not None:
            positive("band_sd", self.band_sd)
        for name, (low, high) in (self.bands or {}).items():
            if not low <= high:
                raise InputError(f"the band of {name!r} must be (low, high), not ({low}, {high})")

    @property
    def kind(self) -> str:
        """The name of this kind of rule."""
        return "outside band"

    @property
    def consecutive(self) -> int:
        """Readings in a row that make an alarm."""
        return self.k

    @property
    def uncalibrated(self) -> bool:
        """Whether it takes the monitor's base band."""
        return self.bands is None and self.band_sd is None

    def begin(self, start: Start) -> None:
        """A run starts: take its base bands."""
        for name in self.bands or {}:
            check_known(name, start.features)
        super().begin(start)

    def describe(self) -> str:
        """The rule in one line."""
        if self.bands is None:
            band = "the base band" if self.band_sd is None else f"base +- {self.band_sd:g} sd"
        else:
            band = "its given band"
        return f"{self.title}: {self._whom()} outside {band} {in_a_row(self.k)}{self._sided()}"

    def band(self, value: FeatureValue, n_probes: int) -> tuple[float, float]:
        """The band of a feature, in its units; NaN where it has none (one probe has no deviation)."""
        if value.name in (self.bands or {}):
            return (self.bands or {})[value.name]
        if self.band_sd is None and value.name in self._memory.bands:
            return beyond_chance(*self._memory.bands[value.name], value)
        sd = value.base_sd if n_probes > 1 else math.nan
        band = Band.of(value.base_mean, sd, BAND_SD if self.band_sd is None else self.band_sd)
        return (band.low, band.high) if self.band_sd is not None else beyond_chance(band.low, band.high, value)

    def _compare_feature(self, state: SubjectState, value: FeatureValue, reading: Reading) -> Comparison | None:
        low, high = self.band(value, reading.n_probes)
        if math.isnan(low) or math.isnan(high):
            return None
        above = self.side != "down" and value.mean > high and not math.isclose(value.mean, high, rel_tol=ROUNDING)
        below = self.side != "up" and value.mean < low and not math.isclose(value.mean, low, rel_tol=ROUNDING)
        limit, where = (low, "below") if below else (high, "above")
        count = in_a_row(state.over + 1)
        text = f"was outside its band {count}: {value.mean:.4g}, {where} {limit:.4g}{shifted(value)}"
        return Comparison(value.mean, limit, above or below, not (above or below), text)

    def _missing(self, value: FeatureValue) -> str:
        return "it has no band: use more probes, or give bands="
