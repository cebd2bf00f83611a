"""A study's arms as its manifest names them, in the order and the look that every figure gives them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from persona_probe.report.theme import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, YELLOW

BASE = "base"


@dataclass(frozen=True)
class ArmStyle:
    """How an arm looks and what it is called."""

    colour: str
    """Hexadecimal."""
    symbol: str
    """A plotly marker."""
    label: str
    """Plain text: an unknown arm's is the name that its config gave it, so escape it."""


INDUCED_STYLES = {
    BASE: ArmStyle(GREY, "circle", "base"),
    "incorrect": ArmStyle(VERMILLION, "square", "incorrect"),
    "correct": ArmStyle(BLUE, "diamond", "correct (control)"),
}
REALIGN_STYLES = {
    "realigned_in": ArmStyle(GREEN, "triangle-up", "re-aligned, same domain"),
    "realigned_out": ArmStyle(PURPLE, "triangle-down", "re-aligned, other domain"),
}
MORE_COLOURS = (ORANGE, SKY, YELLOW)
MORE_SYMBOLS = ("cross", "x", "star", "pentagon", "hexagon", "hourglass", "bowtie")
"""Arms of other names take these in turn; three colours and seven symbols give 21 different looks."""


@dataclass(frozen=True)
class Arms:
    """Names of a study's arms: base first, then the config's, then the re-aligned ones."""

    induced: tuple[str, ...] = ()
    """Arms that the induce stage trains, in the config's order."""
    realigned: tuple[str, ...] = ()
    """Corrective arms, in the config's order."""
    start: str = "incorrect"
    """The arm that the corrective arms repair."""

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Self:
        """The arms of a manifest's config; none where it has no config yet."""
        config = _mapping(manifest.get("config"))
        realign = _mapping(config.get("realign"))
        start = str(realign.get("start") or cls.start)
        return cls(tuple(_mapping(config.get("arms"))), tuple(_mapping(realign.get("arms"))), start)

    @property
    def names(self) -> tuple[str, ...]:
        """All arms, in the order in which figures show them."""
        return (BASE, *self.induced, *self.realigned)

    @cached_property
    def styles(self) -> dict[str, ArmStyle]:
        """Colour, symbol and label by arm."""
        known = {name: INDUCED_STYLES[name] for name in (BASE, *self.induced) if name in INDUCED_STYLES}
        known |= {name: REALIGN_STYLES[name] for name in self.realigned if name in REALIGN_STYLES}
        others = [name for name in self.names if name not in known]
        return {**known, **{name: _further(i, name) for i, name in enumerate(others)}}

    def label(self, arm: str) -> str:
        """What the report calls an arm (plain text)."""
        return self.styles[arm].label if arm in self.styles else arm


def _further(i: int, name: str) -> ArmStyle:
    return ArmStyle(MORE_COLOURS[i % len(MORE_COLOURS)], MORE_SYMBOLS[i % len(MORE_SYMBOLS)], name)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
