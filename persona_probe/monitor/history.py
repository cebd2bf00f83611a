"""The history of a run, from its events: curves, alarms and faults, bounded in number."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self, TypeVar

from persona_probe.monitor.events import Alarm, Behaviour, End, Event, Fault, Reading, Start

LIMIT = 1000
"""Points per curve."""
Point = TypeVar("Point", Reading, Behaviour)


@dataclass
class History:
    """The events so far. A run that starts again replaces what it did at the same or later steps.

    When a curve is full, every second point except the first and the last is dropped: a long run keeps its shape at
    half the resolution.
    """

    limit: int = LIMIT
    start: Start | None = None
    readings: dict[str, list[Reading]] = field(default_factory=dict)
    """By mode."""
    behaviours: dict[str, list[Behaviour]] = field(default_factory=dict)
    """By name."""
    alarms: list[Alarm] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    end: End | None = None
    starts: int = 0
    """How often a monitor started; more than once if a run was resumed or repeated."""
    taken: int = 0
    """Readings so far, dropped ones included."""
    _resuming: bool = False

    def add(self, events: Iterable[Event]) -> Self:
        """Add events, in their order."""
        for event in events:
            self._add(event)
        return self

    @property
    def latest(self) -> Reading | None:
        """The reading at the last step; of two at the same step, the one on the probes."""
        last = [curve[-1] for curve in self.readings.values() if curve]
        return max(last, key=lambda reading: (reading.step, reading.mode == "probe"), default=None)

    @property
    def features(self) -> list[str]:
        """Names of the features, in the order of the start, then of the readings."""
        names = dict.fromkeys(self.start.features if self.start else ())
        for curve in self.readings.values():
            names.update(dict.fromkeys(f.name for f in curve[-1].features))
        return list(names)

    def _add(self, event: Event) -> None:
        if isinstance(event, Start):
            self.start, self.end, self._resuming = event, None, self.starts > 0
            self.starts += 1
            return
        if self._resuming:
            self._drop_from(event.step)
            self._resuming = False
        if isinstance(event, Reading):
            self.taken += 1
            _append(self.readings.setdefault(event.mode, []), event, self.limit)
        elif isinstance(event, Behaviour):
            _append(self.behaviours.setdefault(event.name, []), event, self.limit)
        elif isinstance(event, Alarm):
            self.alarms = [*self.alarms, event][-self.limit :]
        elif isinstance(event, Fault):
            self.faults = [*self.faults, event][-self.limit :]
        else:
            self.end = event

    def _drop_from(self, step: int) -> None:
        self.readings = {mode: left for mode, curve in self.readings.items() if (left := _before(curve, step))}
        self.behaviours = {name: left for name, curve in self.behaviours.items() if (left := _before(curve, step))}
        self.alarms = [alarm for alarm in self.alarms if alarm.step < step]
        self.faults = [fault for fault in self.faults if fault.step < step]


def _before(curve: list[Point], step: int) -> list[Point]:
    return [point for point in curve if point.step < step]


def _append(curve: list[Point], point: Point, limit: int) -> None:
    if len(curve) >= limit:
        del curve[1:-1:2]
    curve.append(point)
