"""The units of a run: pieces of work that one process makes whole, one after the other or in several processes."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from persona_probe.locks import PATIENCE_S
from persona_probe.runs import RunFolder

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class WorkContext(Protocol):
    """What units are made with: a run folder, and models loaded on first use."""

    workers: "Workers | None"
    """Other processes that make units; None makes them in this one."""

    @property
    def run(self) -> RunFolder:
        """The folder that units go to."""
        ...

    @property
    def device(self) -> str:
        """Where models are."""
        ...

    def opener(self, device: str) -> Callable[[], "WorkContext"]:
        """Makes the same context in another process, with models on `device`; it can be pickled."""
        ...


C = TypeVar("C", bound=WorkContext)


def writes_run(stage: Callable[Concatenate[C, P], T]) -> Callable[Concatenate[C, P], T]:
    """Decorate a stage, which takes a context first: it has the run folder to itself while it works.

    A second process that starts a stage in the same folder is refused with the owner's process id.
    """

    @functools.wraps(stage)
    def alone(ctx: C, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with ctx.run.writing(shared=shares(ctx.workers)):
            return stage(ctx, *args, **kwargs)

    return alone


@dataclass(frozen=True)
class Unit:
    """A piece of a run that one process makes; it appears when it is whole."""

    place: str
    """The file or folder of the run that is there when the unit is finished."""
    make: Callable[[], Any]
    stage: str
    """What the run's manifest counts its seconds as."""
    finished: Callable[[], bool] | None = None
    """Whether it is finished, where that is more than the existence of `place`."""
    trained: bool = False
    """Whether making it is a training that several processes can share, each with a part of the batch."""

    def is_finished(self, run: RunFolder) -> bool:
        """Whether it is in the folder, whole."""
        return run.has(self.place) if self.finished is None else self.finished()

    def make_in(self, run: RunFolder, wait: float = PATIENCE_S) -> None:
        """Make it, unless that was done; no other process makes it meanwhile.

        Raises:
            InputError: another process makes it, for longer than `wait` seconds.
        """
        with run.locked(self.place, wait):
            if not self.is_finished(run):
                with run.timed(self.stage):
                    self.make()


UnitsOf = Callable[[Any], Sequence[Unit]]
"""A context to its units of one kind, in the order of a serial run. A function of a module, so that another process
finds it by its name."""


class Workers(Protocol):
    """Processes that make the units of a run."""

    @property
    def shared(self) -> bool:
        """Whether other processes, which this one did not start, write the folder too."""
        ...

    @property
    def joint(self) -> bool:
        """Whether they see each other's units; shards in folders of their own do not."""
        ...

    def make(self, ctx: WorkContext, units_of: UnitsOf, units: Sequence[Unit], after: Callable[[], Any]) -> None:
        """Make those of the units that are not finished, in any order; call `after` when one has been."""
        ...


def shares(workers: Workers | None) -> bool:
    """Whether workers share the run folder with processes that others started."""
    return workers is not None and workers.shared


def make_units(ctx: WorkContext, units_of: UnitsOf, after: Callable[[], Any] = lambda: None) -> None:
    """Make the units that are not finished: in this process, in order, or by the context's workers.

    Args:
        units_of: gives the context's units.
        after: called in this process each time a unit has been finished.

    Raises:
        InputError: of a unit, or another process is making it.
    """
    units = units_of(ctx)
    if ctx.workers is not None:
        ctx.workers.make(ctx, units_of, units, after)
        return
    for number, unit in enumerate(units, 1):
        if not unit.is_finished(ctx.run):
            log.info("%s: %s (%d of %d)", unit.stage, _short(unit.place), number, len(units))
            unit.make_in(ctx.run)
            after()


def _short(place: str) -> str:
    """A unit's place without its folder and the endings of its file."""
    return place.rpartition("/")[2].partition(".")[0]
