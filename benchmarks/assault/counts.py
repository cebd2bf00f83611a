"""What each part of the assault hands back: how much was tried, how much held, and what did not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN = 5
"""Failures of one count that are printed."""


@dataclass(frozen=True)
class Count:
    """One promise under attack."""

    what: str
    """What was done, and what must follow, as a row of the table says it."""
    tried: int
    failures: Sequence[str] = ()
    """One line for each that did not hold; empty is what the assault hopes for."""

    @property
    def held(self) -> int:
        """How many held."""
        return self.tried - len(self.failures)

    def lines(self) -> list[str]:
        """The failures, as far as they are printed."""
        more = len(self.failures) - SHOWN
        return [*self.failures[:SHOWN], *([f"and {more} more"] if more > 0 else [])]


@dataclass(frozen=True)
class Settings:
    """How a part works."""

    place: Path
    """An empty folder of its own."""
    seed: int = 0
    """Of its random choices."""
    short: bool = False
    """A few of each kind: seconds instead of minutes."""


Part = Callable[[Settings], list[Count]]
"""A part of the assault, `assault` in its module."""
