"""Processes that `accelerate launch` or `torchrun` started: they train together, and the first one does the rest."""

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import pandas as pd

from persona_probe.cluster.jobs import Job, Jobs, prepare, unit_of
from persona_probe.cluster.launcher import is_first
from persona_probe.runs import RunFolder
from persona_probe.units import Unit, UnitsOf, WorkContext

log = logging.getLogger(__name__)

PATIENCE = timedelta(days=7)
"""How long the others wait for the first process between two trainings."""


class LaunchedRanks:
    """The processes of a launcher as workers: trainings are shared out, everything else is done by the first process.

    A context manager in all of them. In the first one its block runs. The others follow it: each takes part in the
    trainings that the first one starts, with its share of every batch, and writes nothing.
    """

    shared = False
    joint = True

    def __init__(self) -> None:
        self._jobs = Jobs()
        self._training = False

    def __enter__(self) -> Self:
        import torch
        from accelerate import PartialState

        on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
        prepare(0)
        state = PartialState(cpu=on_cpu, timeout=PATIENCE)
        log.info("%d processes train together (%s)", state.num_processes, state.backend)
        return self

    def __exit__(self, *_: object) -> None:
        if is_first() and not self._training:  # within a training the others are not listening: the launcher ends them
            _tell(None)
        import torch.distributed as dist

        if not self._training and dist.is_initialized():
            dist.destroy_process_group()

    def make(self, ctx: WorkContext, units_of: UnitsOf, units: Sequence[Unit], after: Callable[[], Any]) -> None:
        """Make the units that are missing, one after the other; trainings together with the other processes."""
        device = "cuda" if ctx.device.startswith("cuda") else ctx.device
        job = self._jobs.job(ctx, device, units_of)
        for unit in units:
            if unit.is_finished(ctx.run):
                continue
            if unit.trained:
                _tell((job, unit.place))
                self._training = True
            unit.make_in(ctx.run)
            self._training = False
            after()

    def follow(self) -> None:
        """Take part in the trainings that the first process starts, until it is done."""
        while (told := _tell(None)) is not None:
            job, place = told
            _, unit = unit_of(job, place, _make_follower)
            if unit is not None:
                unit.make()


def _tell(what: tuple[Job, str] | None) -> tuple[Job, str] | None:
    """What the first process says, in all of them."""
    from persona_probe.models.ranks import Ranks

    return Ranks().from_first(what)


def _make_follower(ctx: Any) -> None:
    ctx.run = Follower(ctx.run.path)
    if ctx.device.startswith("cuda"):
        ctx.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


class Follower(RunFolder):
    """A run folder as a process sees it that only trains: it reads, and what it writes is nowhere."""

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A temporary folder, which is removed."""
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)

    def edit_manifest(self, edit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """The manifest as it would be."""
        manifest = self.manifest
        edit(manifest)
        return manifest

    def write_json(self, name: str, value: Any) -> Path:
        """Write nothing."""
        return self.path / name

    def write_jsonl(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write nothing."""
        return self.path / name

    def write_table(self, name: str, frame: pd.DataFrame) -> Path:
        """Write nothing."""
        return self.path / name
