"""Alarm on a feature that leaves its band."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from persona_probe.errors import InputError
from persona_probe.monitor.alarms.rules import (
    ReadingRule,
    SidedRule,
    Track,
    Verdict,
    check_count,
    check_known,
    in_a_row,
    positive,
    shifted,
)
from persona_probe.monitor.band import Band
from persona_probe.monitor.events import FeatureValue, Reading, Start
from persona_probe.monitor.records import BASE_KEY

BAND_SD = 0.5
"""Half-width in base standard deviations where the monitor gives no band; the monitor's own default."""
ROUNDING = 1e-6
"""Relative tolerance at a band's ends: a base that does not vary has a band of no width."""


@dataclass(frozen=True, eq=False)
class OutsideBand(SidedRule):
    """Fires when a feature's mean was outside its band for `k` readings in a row.

    The band is, in this order: that of `bands`; base mean +- `band_sd` base standard deviations, where `band_sd` is
    given; the monitor's base band; base mean +- `BAND_SD`. A latent that is silent on the base has a band of no width,
    so that its first activity counts as outside.

    Raises:
        InputError: `k` below 1, a width that is not positive, a band that is upside down, or bands of unknown features.
    """

    k: int = 2
    band_sd: float | None = None
    """Half-width in base standard deviations."""
    bands: Mapping[str, tuple[float, float]] | None = None
    """Feature name to (low, high), in the feature's units: calibrated on benign runs, say."""

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
    def wanted(self) -> int:
        """Readings in a row that make an alarm."""
        return self.k

    def begin(self, start: Start) -> None:
        """A run starts: its base bands are taken."""
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
            return self._memory.bands[value.name]
        sd = value.base_sd if n_probes > 1 else math.nan
        band = Band.of(value.base_mean, sd, BAND_SD if self.band_sd is None else self.band_sd)
        return band.low, band.high

    def _judge_feature(self, track: Track, value: FeatureValue, reading: Reading) -> Verdict | None:
        low, high = self.band(value, reading.n_probes)
        if math.isnan(value.mean) or math.isnan(low) or math.isnan(high):
            return None
        above = self.side != "down" and value.mean > high and not math.isclose(value.mean, high, rel_tol=ROUNDING)
        below = self.side != "up" and value.mean < low and not math.isclose(value.mean, low, rel_tol=ROUNDING)
        limit, where = (low, "below") if below else (high, "above")
        count = in_a_row(track.over + 1)
        text = f"was outside its band {count}: {value.mean:.4g}, {where} {limit:.4g}{shifted(value)}"
        return Verdict(value.mean, limit, above or below, not (above or below), text)

    def _missing(self, value: FeatureValue) -> str:
        return "its value is NaN" if math.isnan(value.mean) else "it has no band: use more probes, or give bands="


# --- Control charts: small lasting changes of a feature, summed over readings


@dataclass
class Sums(Track):
    """Page's two sums."""

    up: float = 0.0
    down: float = 0.0


@dataclass(frozen=True, eq=False)
class Cusum(SidedRule):
    """Cumulative sums (Page 1954): S = max(0, S + shift - drift) upward, S = max(0, S - shift - drift) downward.

    Fires when a sum exceeds `threshold`. The sums then start again at zero, and the rule is armed again at the first
    reading within `drift` of the base. `inside` is true where the watched sums are zero: by Page's own estimate, the
    last such reading is where a change began.

    With independent normal readings of unit variance and drift 0.5, both sides, a threshold of 4 gives a false alarm
    every 168 readings, one of 5 every 465.

    Raises:
        InputError: a negative drift, or a threshold that is not positive.
    """

    drift: float = 0.5
    """Slack per reading, in base sd: half the change to be found."""
    threshold: float = 5.0
    """In base sd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("drift", self.drift, zero=True)
        positive("threshold", self.threshold)

    @property
    def kind(self) -> str:
        """The name of this kind of rule."""
        return "cusum"

    def describe(self) -> str:
        """The rule in one line."""
        numbers = f"drift {self.drift:g}, threshold {self.threshold:g} base sd"
        return f"{self.title}: cumulative sum of {self._whom()}, {numbers}{self._sided()}"

    def _new_track(self) -> Track:
        return Sums()

    def _judge_feature(self, track: Track, value: FeatureValue, reading: Reading) -> Verdict | None:
        assert isinstance(track, Sums)
        if math.isnan(value.shift):
            return None
        if track.firing:
            track.up = track.down = 0.0
        track.up = max(0.0, track.up + value.shift - self.drift) if self.side != "down" else 0.0
        track.down = max(0.0, track.down - value.shift - self.drift) if self.side != "up" else 0.0
        largest, side = max((track.up, "upward"), (track.down, "downward"))
        text = f"changed: {side} sum {largest:.3g} above {self.threshold:g}{shifted(value)}"
        return Verdict(largest, self.threshold, largest > self.threshold, largest == 0, text)


@dataclass
class Average(Track):
    """Roberts' moving average, and how many readings are in it."""

    average: float = 0.0
    seen: int = 0


@dataclass(frozen=True, eq=False)
class Ewma(SidedRule):
    """Exponentially weighted moving average (Roberts 1959): z = lam * shift + (1 - lam) * z, from z = 0.

    Fires when |z| exceeds its exact limit after t readings, width * sd * sqrt(lam / (2 - lam) * (1 - (1 - lam)^(2t))).

    Raises:
        InputError: `lam` outside (0, 1], or a width or sd that is not positive.
    """

    lam: float = 0.2
    """Weight of the newest reading (Roberts' lambda)."""
    width: float = 3.0
    """Limit in standard deviations of z (the literature's L)."""
    sd: float = 1.0
    """Standard deviation of one benign reading's shift, in base sd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lam <= 1:
            raise InputError(f"lam must be above 0 and at most 1, not {self.lam}")
        positive("width", self.width)
        positive("sd", self.sd)

    @property
    def kind(self) -> str:
        """The name of this kind of rule."""
        return "ewma"

    def describe(self) -> str:
        """The rule in one line."""
        numbers = f"lam {self.lam:g}, width {self.width:g}, sd {self.sd:g}"
        return f"{self.title}: moving average of {self._whom()}, {numbers}{self._sided()}"

    def limit(self, t: int) -> float:
        """Limit of |z| after t readings, in base sd."""
        return self.width * self.sd * math.sqrt(self.lam / (2 - self.lam) * (1 - (1 - self.lam) ** (2 * t)))

    def _new_track(self) -> Track:
        return Average()

    def _judge_feature(self, track: Track, value: FeatureValue, reading: Reading) -> Verdict | None:
        assert isinstance(track, Average)
        if math.isnan(value.shift):
            return None
        track.seen += 1
        track.average = self.lam * value.shift + (1 - self.lam) * track.average
        z, limit = track.average, self.limit(track.seen)
        over = (self.side != "down" and z > limit) or (self.side != "up" and z < -limit)
        signed = math.copysign(limit, z)
        text = f"changed: moving average {z:+.3g} beyond {signed:+.3g}{shifted(value)}"
        return Verdict(z, signed, over, not over, text)


# --- Alarm on an SAE that no longer fits the model: its feature curves are then not to be trusted

FLOOR = 0.5
"""The floor where neither `floor` nor `drop` is given."""
SUBJECT = "explained variance"


@dataclass
class Fitted(Track):
    """The explained variance that a drop counts from."""

    reference: float = math.nan


@dataclass(frozen=True, eq=False)
class ExplainedVarianceFloor(ReadingRule):
    """Fires when the SAE's explained variance is under a floor: "the SAE no longer fits, do not trust the curve".

    With both `floor` and `drop` the higher floor counts; with neither, the floor is `FLOOR`.

    Raises:
        InputError: a floor that is not below 1, a drop outside (0, 1), or `k` below 1.
    """

    floor: float | None = None
    """Absolute."""
    drop: float | None = None
    """As a share of the base's explained variance (of the run's first reading, where the start does not give it)."""
    k: int = 1
    _base: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k)
        if self.floor is not None and not self.floor < 1:
            raise InputError(f"floor must be below 1, the explained variance of a perfect fit, not {self.floor}")
        if self.drop is not None and not 0 < self.drop < 1:
            raise InputError(f"drop must be a share between 0 and 1 of the base's explained variance, not {self.drop}")

    @property
    def kind(self) -> str:
        """The name of this kind of rule."""
        return "explained variance floor"

    @property
    def wanted(self) -> int:
        """Readings in a row that make an alarm."""
        return self.k

    def begin(self, start: Start) -> None:
        """A run starts: the base's explained variance is taken, where it is given."""
        super().begin(start)
        self._base.clear()
        base = start.metadata.get(BASE_KEY)
        if isinstance(base, int | float) and math.isfinite(base):
            self._base[BASE_KEY] = float(base)

    def describe(self) -> str:
        """The rule in one line."""
        parts = [] if self.drop is None else [f"{1 - self.drop:.0%} of the base's"]
        parts += [f"{self._absolute:g}"] if self._absolute > -math.inf else []
        modes = "" if self.mode is None else f" ({self.mode} readings)"
        return f"{self.title}: explained variance{modes} under {' or '.join(parts)} {in_a_row(self.k)}"

    @property
    def _absolute(self) -> float:
        if self.floor is not None:
            return self.floor
        return FLOOR if self.drop is None else -math.inf

    def _subjects(self, reading: Reading) -> Sequence[str]:
        return [SUBJECT]

    def _new_track(self) -> Track:
        return Fitted(reference=self._base.get(BASE_KEY, math.nan))

    def _judge(self, track: Track, subject: str, reading: Reading) -> Verdict | None:
        assert isinstance(track, Fitted)
        value = reading.explained_variance
        if math.isnan(value):
            self._warn("explained variance is ignored where it is NaN (no SAE was used, or it was not asked for)")
            return None
        if math.isnan(track.reference):
            track.reference = value
        floor = max(self._absolute, -math.inf if self.drop is None else track.reference * (1 - self.drop))
        text = f"is {value:.3f}, under {floor:.3f}: the SAE no longer fits, do not trust the feature curves"
        return Verdict(value, floor, value < floor, value >= floor, text)
