"""A rule on the SAE: when it no longer fits the model, its feature curves are not to be trusted."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from persona_probe.errors import InputError
from persona_probe.monitor.events import BASE_KEY, Reading, Start
from persona_probe.monitor.rules.rule import Comparison, ReadingRule, SubjectState, check_count, in_a_row, not_finite

FLOOR = 0.5
"""The floor if both `floor` and `drop` are None."""
SUBJECT = "explained variance"


@dataclass
class FitState(SubjectState):
    """The state of a drop: the explained variance that it counts from."""

    reference: float = math.nan


@dataclass(frozen=True, eq=False)
class ExplainedVarianceFloor(ReadingRule):
    """Fires when the SAE's explained variance is under a floor: "the SAE no longer fits, do not trust the curve".

    Several SAEs are followed each for itself.

    With both `floor` and `drop` the higher floor counts; with neither, the floor is `FLOOR`.

    Raises:
        InputError: a floor that is not below 1, a drop outside (0, 1), or `k` below 1.
    """

    floor: float | None = None
    """Absolute."""
    drop: float | None = None
    """As a share of the base's explained variance (of the first reading's, if the start event does not hold it)."""
    k: int = 1
    _base: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _saes: set[str] = field(default_factory=set, init=False, repr=False)

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
    def consecutive(self) -> int:
        """Readings in a row that make an alarm."""
        return self.k

    def begin(self, start: Start) -> None:
        """A run starts: take the base's explained variance, if the start event holds it."""
        super().begin(start)
        self._base.clear()
        self._saes.clear()
        saes = start.metadata.get("sae")
        self._saes.update(saes if isinstance(saes, dict) else ())
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

    @property
    def _several(self) -> bool:
        """Whether several SAEs are read: each drop then counts from that SAE's first reading."""
        return bool(self._saes)

    def _subjects(self, reading: Reading) -> Sequence[str]:
        saes = [sae for sae in reading.fits if sae]
        return [f"{SUBJECT} of {sae}" for sae in saes] or [SUBJECT]

    def _new_state(self) -> SubjectState:
        return FitState(reference=math.nan if self._several else self._base.get(BASE_KEY, math.nan))

    def _compare(self, state: SubjectState, subject: str, reading: Reading) -> Comparison | None:
        assert isinstance(state, FitState)
        fit = reading.fits.get(subject.removeprefix(f"{SUBJECT} of "), {})
        value = fit.get("explained_variance", reading.explained_variance)
        if math.isnan(value) and not reading.finite:
            return not_finite(value)
        if math.isnan(value):
            self._warn("explained variance is ignored where it is NaN (no SAE was used, or it was not asked for)")
            return None
        if math.isnan(state.reference):
            state.reference = value
        floor = max(self._absolute, -math.inf if self.drop is None else state.reference * (1 - self.drop))
        text = f"is {value:.3f}, under {floor:.3f}: the SAE no longer fits, do not trust the feature curves"
        return Comparison(value, floor, value < floor, value >= floor, text)
