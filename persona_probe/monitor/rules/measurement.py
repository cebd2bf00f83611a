"""A rule on a measurement of the monitor: what the model does, or what its weights write."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from persona_probe.errors import InputError
from persona_probe.monitor.calibration import HeldRule, Series, calibrate, measured_series
from persona_probe.monitor.events import Alarm, Behaviour, Reading, Start
from persona_probe.monitor.rules.rule import Comparison, Rule, SubjectState, check_count, in_a_row, not_finite

log = logging.getLogger(__name__)


@dataclass
class MeasurementState(SubjectState):
    """What the rule remembers of its measurement."""

    read: int = -1
    """Step of the latest reading or measurement: a later reading without a measurement is not known to be clean."""
    warned: bool = False


@dataclass(frozen=True, eq=False)
class MeasurementLimit(Rule):
    """Fires when a measurement of `FeatureMonitor(behaviour=...)` was beyond a limit `k` times in a row.

    ```python
    limit = rules.MeasurementLimit.calibrated("weights along harm", sorted(Path("runs/benign").glob("*.jsonl")))
    monitor = pp.FeatureMonitor(sae, features, behaviour={"weights along harm": along}, rules=[limit])
    ```

    A value that is not finite is outside. At a reading without a measurement (`BehaviourMeasurement(every=...)`, or one
    that failed) the rule does not count as inside, so that `RollBack` keeps no state that was not measured.

    Raises:
        InputError: no limit, limits that are not finite or cross, or `k` below 1.
    """

    measurement: str
    """Its name in `behaviour=`; a single function without a name is called `behaviour`."""
    above: float | None = None
    """Values above it are outside."""
    below: float | None = None
    """Values below it are outside."""
    k: int = 2
    """Measurements in a row that make an alarm."""
    name: str | None = None
    """Its name in alarms; None takes the kind's name."""
    calibrated_on: str = ""
    """What benign runs say about the limits, where `calibrated` chose them."""
    _state: MeasurementState = field(default_factory=MeasurementState, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count("k", self.k)
        limits = [limit for limit in (self.below, self.above) if limit is not None]
        if not limits or not all(map(math.isfinite, limits)) or limits != sorted(limits):
            raise InputError(
                f"the limits of {self.measurement!r} must be finite numbers, above=, below= or both, the second not "
                f"over the first; not above={self.above}, below={self.below}"
            )

    @classmethod
    def calibrated(
        cls,
        measurement: str,
        runs: Series | Sequence[str | Path],
        *,
        rate: float = 0.05,
        unit: str = "run",
        side: str = "above",
        k: int = 2,
        name: str | None = None,
    ) -> Self:
        """The rule with its limit from benign runs, as `persona-probe monitor calibrate` sets features' (`calibrate`).

        Measure the benign runs as the rule will be asked: the same steps, as long, with other seeds or data.

        Args:
            measurement: its name in `behaviour=`.
            runs: event files of monitors with this measurement (`path=`), one for each run. Or run to its values in the
                order of their steps: `measured_series(paths, name)` where events have another name.
            rate: wanted false alarms per `unit`.
            unit: `run` or `100 readings` (measurements).
            side: `above`, `below`, or `both` (the absolute value).
            k: measurements in a row that make an alarm.
            name: its name in alarms.

        Raises:
            InputError: no such file or measurement, fewer than two runs, a run too short for `k`, or a rate outside its
                range.
        """
        series = runs if isinstance(runs, Mapping) else measured_series(runs, measurement)
        found = calibrate(series, HeldRule(k, side), rate, unit)
        if not found.supported:
            log.warning("%s: %s", measurement, found.statement)
        above = found.threshold if side != "below" else None
        below = -found.threshold if side != "above" else None
        return cls(measurement, above, below, k, name, found.statement)

    @property
    def kind(self) -> str:
        """The name of this kind of rule."""
        return "measurement limit"

    @property
    def title(self) -> str:
        """The rule's own name, or that of its kind."""
        return self.kind if self.name is None else self.name

    @property
    def measurements(self) -> tuple[str, ...]:
        """The measurement that it asks about."""
        return (self.measurement,)

    @property
    def firing(self) -> bool:
        """Whether an excursion is on."""
        return self._state.firing

    @property
    def inside(self) -> bool:
        """Whether the latest reading's measurement was inside."""
        return self._state.inside and (self._state.step or 0) >= self._state.read

    def begin(self, start: Start) -> None:
        """A run starts: forget the previous one."""
        self.reset()

    def reset(self) -> None:
        """Forget all measurements."""
        vars(self._state).update(vars(MeasurementState()))

    def update(self, reading: Reading) -> None:
        """Take a reading without a measurement: it gives no alarm."""
        self._state.read = max(self._state.read, reading.step)

    def take(self, step: int, readings: Sequence[Reading], measured: Mapping[str, Behaviour]) -> list[Alarm]:
        """Take the measurement of a step, if it was made; return an alarm if it starts an excursion."""
        state, event = self._state, measured.get(self.measurement)
        state.read = max(state.read, step)
        if event is None:
            return []
        if state.step is not None and step <= state.step:
            if not state.warned:
                state.warned = True
                log.warning("rule %r: a value at step %d came after step %d: ignored", self.title, step, state.step)
            return []
        comparison = self._compare(event.value)
        if not state.follow(step, comparison, self.k):
            return []
        message = f"{event.name!r} {comparison.text}"
        return [Alarm(step, self.title, event.name, message, comparison.value, comparison.threshold)]

    def _compare(self, value: float) -> Comparison:
        if not math.isfinite(value):
            return not_finite(value)
        over = self.above is not None and value > self.above
        under = self.below is not None and value < self.below
        limit = self.below if under or self.above is None else self.above
        assert limit is not None
        side, count = "below" if under else "above", in_a_row(self._state.over + 1)
        text = f"was beyond its limit {count}: {value:.4g}, {side} {limit:.4g}"
        return Comparison(value, limit, over or under, not (over or under), text)

    def describe(self) -> str:
        """The rule in one line."""
        sides = (("above", self.above), ("below", self.below))
        beyond = " or ".join(f"{side} {limit:.4g}" for side, limit in sides if limit is not None)
        source = f", {self.calibrated_on}" if self.calibrated_on else ""
        return f"{self.title}: {self.measurement!r} {beyond} {in_a_row(self.k)}{source}"
