"""Several processes that nobody starts for each other: on one run folder, or each with its share in its own folder."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from persona_probe.errors import InputError
from persona_probe.locks import InUse
from persona_probe.units import Unit, UnitsOf, WorkContext

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sharing:
    """This process and others that were started the same way fill one run folder, unit by unit.

    Each takes the next unit that no other is making. Before a later stage it waits until all units are there; those of
    a process that has died are taken over. The folder lies on a file system where locks reach all of them.
    """

    every_s: float = 1.0
    """Seconds between two looks at units that others are making."""
    shared = True
    joint = True

    def make(self, ctx: WorkContext, units_of: UnitsOf, units: Sequence[Unit], after: Callable[[], Any]) -> None:
        """Make the units that no other process makes; return when all are there."""
        waiting = list(units)
        while waiting:
            left = [unit for unit in waiting if not _made(ctx, unit, after)]
            if left and len(left) == len(waiting):
                log.info("waiting for %d units that others are making: %s", len(left), left[0].place)
                time.sleep(self.every_s)
            waiting = left


def _made(ctx: WorkContext, unit: Unit, after: Callable[[], Any]) -> bool:
    """Make a unit, unless another process is making it; whether it is finished now."""
    if unit.is_finished(ctx.run):
        return True
    try:
        unit.make_in(ctx.run, wait=0.0)
    except InUse:
        return False
    after()
    return True


@dataclass(frozen=True)
class Shard:
    """This process makes only its share of the units, in a folder of its own; `merge` joins the folders.

    A unit that all the others need, such as the base model's reading, is made by every shard.

    Raises:
        InputError: a number that is not below `count`.
    """

    number: int
    """From 0."""
    count: int
    """How many shards there are."""
    shared = False
    joint = False

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise InputError(f"shard {self.number} of {self.count}: count from 0 to {self.count - 1}")

    @classmethod
    def read(cls, text: str) -> "Shard":
        """A shard as a command line has it: `2/8` is the third of eight.

        Raises:
            InputError: it is not written so.
        """
        number, _, count = text.partition("/")
        if not (number.isdigit() and count.isdigit()):
            raise InputError(f"--shard {text}: write NUMBER/COUNT, from 0/8 to 7/8")
        return cls(int(number), int(count))

    def make(self, ctx: WorkContext, units_of: UnitsOf, units: Sequence[Unit], after: Callable[[], Any]) -> None:
        """Make every `count`-th unit."""
        for unit in units if len(units) == 1 else units[self.number :: self.count]:
            if not unit.is_finished(ctx.run):
                unit.make_in(ctx.run)
                after()
