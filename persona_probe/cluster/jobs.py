"""What another process needs to make a unit: how to open the run there, and which units to look it up in."""

import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona_probe.errors import InputError
from persona_probe.units import Unit, UnitsOf, WorkContext


@dataclass(frozen=True)
class Job:
    """Units of one kind, for a process that makes any of them; it can be pickled."""

    context: str
    """A name of the context: a process that has it already does not load its model again."""
    name: str
    """A name of these units."""
    opener: Callable[[], WorkContext]
    units_of: UnitsOf
    folder: str
    """The run folder."""
    threads: int
    """How many threads a process computes with; 0 leaves it to torch."""


@dataclass
class Jobs:
    """Makes jobs of a context; as long as its settings stay the same, so does the name of the context."""

    _known: tuple[Any, Any, str] | None = None

    def job(self, ctx: WorkContext, device: str, units_of: UnitsOf, threads: int = 0) -> Job:
        """A job of `units_of(ctx)`, with models on `device`."""
        config = getattr(ctx, "config", None)
        if self._known is None or self._known[0] is not ctx or self._known[1] is not config:
            self._known = (ctx, config, uuid.uuid4().hex)
        folder = str(ctx.run.path.resolve())
        return Job(self._known[2], uuid.uuid4().hex, ctx.opener(device), units_of, folder, threads)


@dataclass
class _Loaded:
    context: str = ""
    job: str = ""
    ctx: WorkContext | None = None
    units: dict[str, Unit] = field(default_factory=dict)


_LOADED = _Loaded()
"""What this process has loaded: one context at a time, kept from job to job."""


def unit_of(job: Job, place: str, adjust: Callable[[WorkContext], None] = lambda _: None) -> tuple[Any, Unit | None]:
    """The context and the unit of a job; None for a unit that was finished meanwhile, and is not among them any more.

    Args:
        adjust: called with a context that has just been opened.

    Raises:
        InputError: the run folder is not on this machine.
    """
    if not Path(job.folder).is_dir():
        raise InputError(f"{job.folder} is not on {socket.gethostname()}: put the run on a shared file system")
    if _LOADED.context != job.context:
        _LOADED.ctx, _LOADED.context, _LOADED.job, _LOADED.units = None, "", "", {}
        ctx = job.opener()
        adjust(ctx)
        _LOADED.ctx, _LOADED.context = ctx, job.context
    assert _LOADED.ctx is not None
    if _LOADED.job != job.name:
        _LOADED.units, _LOADED.job = {unit.place: unit for unit in job.units_of(_LOADED.ctx)}, job.name
    return _LOADED.ctx, _LOADED.units.get(place)


def prepare(threads: int) -> None:
    """Make a process ready to load models: its threads, and quiet libraries."""
    import torch

    from persona_probe.models.quiet import quiet_libraries

    if threads:
        torch.set_num_threads(threads)
    quiet_libraries()
