"""Which adapter answers, how often its answers alarm, and when the server goes back to the last clean one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from persona_probe.errors import InputError
from persona_probe.stats import clopper_pearson

BASE = "base"


@dataclass(frozen=True)
class RollbackRule:
    """Go back when a block of answers alarms more often than `rate`, beyond chance.

    Answers are counted in blocks of `block`. The deployed adapter is given up as soon as the alarms of the present
    block are so many that the exact lower bound of its rate lies above `rate`. An adapter whose true alarm rate is at
    most `rate` is given up in at most `risk` of its blocks (binomial; answers taken as independent).

    Raises:
        InputError: a number out of its range, or a block in which no count of alarms is enough.
    """

    rate: float
    """Highest share of answers with an alarm that is accepted, such as the calibrated false-alarm rate's upper end."""
    block: int = 50
    risk: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1 or not 0 < self.risk < 1:
            raise InputError(f"rate and risk of a roll-back must lie between 0 and 1, not {self.rate} and {self.risk}")
        if self.block < 1 or self.alarms > self.block:
            raise InputError(f"{self.block} answers cannot show a rate above {self.rate:g}: count in longer blocks")

    @cached_property
    def alarms(self) -> int:
        """Alarms of a block from which on the adapter is given up; `block` + 1 where no number is enough."""
        level = 1 - 2 * self.risk  # one-sided
        counts = range(1, self.block + 1)
        return next((n for n in counts if clopper_pearson(n, self.block, level)[0] > self.rate), self.block + 1)

    def describe(self) -> str:
        """The rule in one line."""
        return f"roll back at {self.alarms} alarms in {self.block} answers (a rate above {self.rate:g})"


@dataclass(frozen=True)
class Deployed:
    """Something that can answer: an adapter of the base model, or the base itself."""

    name: str
    checkpoint: Path | None
    """None is the base."""


@dataclass
class Deployment:
    """The adapters in the order in which they were deployed; the last one answers, the base is the first.

    Args:
        adapters: folders, oldest first.
        rule: None never goes back.

    Raises:
        InputError: two adapters of one folder.
    """

    adapters: Sequence[Path] = ()
    rule: RollbackRule | None = None
    versions: list[Deployed] = field(init=False)
    answers: int = 0
    """Answers of all adapters so far."""
    alarmed: int = 0
    """How many of them alarmed."""
    block: list[bool] = field(default_factory=list)
    """Of the present block: whether each answer alarmed."""

    def __post_init__(self) -> None:
        if twice := [p for p in self.adapters if list(self.adapters).count(p) > 1]:
            raise InputError(f"adapter {twice[0]} is named twice: name each once, oldest first")
        names = _names(self.adapters)
        self.versions = [Deployed(BASE, None), *(Deployed(n, p) for n, p in zip(names, self.adapters, strict=True))]

    @property
    def current(self) -> Deployed | None:
        """What answers now; None once even the base alarmed too often."""
        return self.versions[-1] if self.versions else None

    def count(self, version: Deployed, alarmed: bool) -> str | None:
        """Count a finished answer; returns what happened, in one line, if its adapter is given up.

        Answers of an adapter that is given up already, which were under way, are not counted for the next one.
        """
        self.answers += 1
        self.alarmed += alarmed
        if self.rule is None or version is not self.current:
            return None
        self.block.append(alarmed)
        count, n = sum(self.block), len(self.block)
        if count < self.rule.alarms:
            if n == self.rule.block:
                self.block = []
            return None
        return self.give_up(version, f"{count} of the last {n} answers alarmed, {self.rule.describe()}")

    def give_up(self, version: Deployed, why: str) -> str:
        """Go back from a version; returns what happened, in one line."""
        self.block = []
        self.versions.remove(version)
        following = self.current
        onward = "no clean one is left: requests are refused" if following is None else f"back to {following.name}"
        return f"{version.name}: {why}; {onward}"


def _names(adapters: Sequence[Path]) -> list[str]:
    """Folder names; with those above where they are the same."""
    for parts in range(1, 12):
        names = ["/".join(path.resolve().parts[-parts:]) for path in adapters]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in adapters]
