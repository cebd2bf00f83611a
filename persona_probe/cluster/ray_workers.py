"""Ray tasks that make a run's units, each in a process with its own model, into one run folder."""

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Self

from persona_probe.cluster.jobs import Job, Jobs, prepare, unit_of
from persona_probe.errors import InputError
from persona_probe.units import Unit, UnitsOf, WorkContext

log = logging.getLogger(__name__)

WAIT_S = 60.0
"""How long a task waits for a unit whose lost worker may still be ending."""
OBJECT_STORE = 100 * 2**20
"""Bytes of Ray's store on this machine: units exchange files, not objects."""


@dataclass
class RayWorkers:
    """Make units as Ray tasks; use it as a context manager, which starts or joins Ray and leaves it at the end.

    A task whose worker is lost is tried again. What is finished is in the run folder, which must lie on a file system
    that all machines of the cluster have under the same path.

    Raises:
        InputError: ray is not installed, or no cluster answers at the address.
    """

    address: str | None = None
    """Of a running cluster (`auto`, `host:6379`, `ray://host:10001`); None starts Ray on this machine, on loopback."""
    num_cpus: int = 1
    """CPU cores of a task; it computes with as many threads."""
    num_gpus: float | None = None
    """GPUs of a task, which then computes on CUDA; None takes one where the run's device is CUDA, else none."""
    retries: int = 2
    """How often a task is tried again whose worker was lost."""
    workers: int | None = None
    """CPU cores that a Ray on this machine may use; None takes all."""
    shared = False
    joint = True
    _ray: ModuleType | None = field(default=None, init=False, repr=False)
    _ours: bool = field(default=False, init=False, repr=False)
    _jobs: Jobs = field(default_factory=Jobs, init=False, repr=False)

    def __post_init__(self) -> None:
        known = self.address is None or self.address == "auto" or self.address.partition("://")[0] == "ray"
        if not known and not re.fullmatch(r"[\w.-]+:\d+", str(self.address)):
            raise InputError(f"{self.address!r} is no address of a cluster: write auto, HOST:PORT or ray://HOST:PORT")

    def __enter__(self) -> Self:
        self._ray = _import_ray(alone=self.address is None)
        if not self._ray.is_initialized():
            self._start(self._ray)
            self._ours = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours and self._ray is not None:
            self._ray.shutdown()
        self._ray, self._ours = None, False

    def _start(self, ray: ModuleType) -> None:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            ray.init(
                num_cpus=self.workers or os.cpu_count(),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                **quiet,
            )
            return
        try:
            _knock(self.address)
            ray.init(address=self.address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"no Ray cluster answers at {self.address!r} ({first}): start one, or leave it out"
            ) from None

    def make(self, ctx: WorkContext, units_of: UnitsOf, units: Sequence[Unit], after: Callable[[], Any]) -> None:
        """Make the units that are missing; the first error ends the others.

        Raises:
            InputError: of a unit, or its worker was lost more often than `retries`.
        """
        missing = [unit for unit in units if not unit.is_finished(ctx.run)]
        if not missing:
            return
        if self._ray is None:
            raise InputError("RayWorkers is a context manager: write `with RayWorkers() as workers`")
        gpus = self.num_gpus if self.num_gpus is not None else float(ctx.device.startswith("cuda"))
        resources = {"num_cpus": self.num_cpus, "num_gpus": gpus, "max_retries": self.retries}
        task = self._ray.remote(**resources)(make_unit)
        job = self._jobs.job(ctx, "cuda" if gpus else ctx.device, units_of, self.num_cpus)
        with self._ended_on_error(self._ray, {task.remote(job, unit.place): unit for unit in missing}) as running:
            while running:
                (finished,), _ = self._ray.wait(list(running), num_returns=1)
                self._result(self._ray, finished, running[finished])
                del running[finished]
                log.info("%d of %d units are there", len(missing) - len(running), len(missing))
                after()

    @contextmanager
    def _ended_on_error(self, ray: ModuleType, running: dict[Any, Unit]) -> Iterator[dict[Any, Unit]]:
        try:
            yield running
        except BaseException:
            for reference in running:
                ray.cancel(reference, force=True)
            raise

    def _result(self, ray: ModuleType, reference: Any, unit: Unit) -> None:
        try:
            ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
            times = self.retries + 1
            raise InputError(
                f"{unit.place}: its worker was lost {times} times, perhaps for want of memory; "
                "give each task more --num-cpus; the same command continues"
            ) from error


def _knock(address: str) -> None:
    """Connect to a cluster's port, and leave: Ray itself would try for minutes.

    Raises:
        OSError: nobody listens there.
    """
    host, _, port = address.partition("://")[-1 if "://" in address else 0].rstrip("/").partition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _import_ray(alone: bool) -> ModuleType:
    # Read while Ray is imported: it reports nothing to its makers, and without a cluster it listens on loopback only.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if alone:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install 'persona-probe[ray]'") from error
    return ray


def make_unit(job: Job, place: str) -> None:
    """Make one unit in this process, a worker of Ray.

    Raises:
        InputError: the run folder is not on this machine, or of the unit.
    """
    prepare(job.threads)
    ctx, unit = unit_of(job, place)
    if unit is not None:
        unit.make_in(ctx.run, WAIT_S)
