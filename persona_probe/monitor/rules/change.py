"""Control charts: rules on small lasting changes of a feature, summed over readings."""

import math
from dataclasses import dataclass

from persona_probe.errors import InputError
from persona_probe.monitor.events import FeatureValue, Reading
from persona_probe.monitor.rules.rule import Comparison, SidedRule, SubjectState, positive, shifted


@dataclass
class CusumState(SubjectState):
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
    """Slack per reading, in base sd: half the change to detect."""
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

    def _new_state(self) -> SubjectState:
        return CusumState()

    def _compare_feature(self, state: SubjectState, value: FeatureValue, reading: Reading) -> Comparison | None:
        assert isinstance(state, CusumState)
        if math.isnan(value.shift):
            return None
        if state.firing:
            state.up = state.down = 0.0
        state.up = max(0.0, state.up + value.shift - self.drift) if self.side != "down" else 0.0
        state.down = max(0.0, state.down - value.shift - self.drift) if self.side != "up" else 0.0
        largest, side = max((state.up, "upward"), (state.down, "downward"))
        text = f"changed: {side} sum {largest:.3g} above {self.threshold:g}{shifted(value)}"
        return Comparison(largest, self.threshold, largest > self.threshold, largest == 0, text)


@dataclass
class EwmaState(SubjectState):
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

    def _new_state(self) -> SubjectState:
        return EwmaState()

    def _compare_feature(self, state: SubjectState, value: FeatureValue, reading: Reading) -> Comparison | None:
        assert isinstance(state, EwmaState)
        if math.isnan(value.shift):
            return None
        state.seen += 1
        state.average = self.lam * value.shift + (1 - self.lam) * state.average
        z, limit = state.average, self.limit(state.seen)
        over = (self.side != "down" and z > limit) or (self.side != "up" and z < -limit)
        signed = math.copysign(limit, z)
        text = f"changed: moving average {z:+.3g} beyond {signed:+.3g}{shifted(value)}"
        return Comparison(z, signed, over, not over, text)
