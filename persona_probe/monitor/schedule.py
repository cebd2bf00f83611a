"""When readings are taken."""

from collections.abc import Sequence
from dataclasses import dataclass

from persona_probe.errors import InputError

EVERY, PROBES = 25, 12
"""Optimizer steps between readings, and packaged probes, where nothing is asked for: at most 2% of training's time on
two cores (`make bench-monitor`)."""


@dataclass(frozen=True)
class Schedule:
    """Every so many optimizer steps, or at chosen ones."""

    every: int | None
    steps: frozenset[int]

    @classmethod
    def of(cls, every: int | None, steps: Sequence[int] | None) -> "Schedule":
        """Check what a user asked for; `every` goes before `steps`.

        Raises:
            InputError: `every` below 1.
        """
        if every is not None and every < 1:
            raise InputError(f"every must be at least 1, not {every}")
        return cls(every or (None if steps is not None else EVERY), frozenset(steps or ()))

    def due(self, step: int) -> bool:
        """Whether a reading belongs to this step."""
        return step in self.steps if self.every is None else step % self.every == 0

    def at_start(self, step: int) -> bool:
        """Whether training that begins at this step is read before its first step."""
        return self.every is not None or step in self.steps
