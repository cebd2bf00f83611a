"""Options of the commands whose work several processes can do: Ray, a shared run folder, shards."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from persona_probe.cli.options import refuse_launcher
from persona_probe.cluster.launcher import is_first, launched
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.units import Workers

HERE = "here"
"""`--ray` without an address."""


@dataclass(frozen=True)
class Crew:
    """Who does the work of a command; by default its own process."""

    ray: str | None = None
    """An address, or `HERE`."""
    num_cpus: int | None = None
    num_gpus: float | None = None
    share: bool = False
    shard: str | None = None
    """NUMBER/COUNT."""

    def __post_init__(self) -> None:
        chosen = [name for name in ("ray", "share", "shard") if getattr(self, name)]
        if len(chosen) > 1:
            raise InputError(f"--{chosen[0]} and --{chosen[1]} do not go together: choose one")
        if self.ray is None and (self.num_cpus is not None or self.num_gpus is not None):
            raise InputError("--num-cpus and --num-gpus are of Ray tasks: add --ray")
        if self.num_cpus is not None and self.num_cpus < 1:
            raise InputError(f"--num-cpus must be at least 1, not {self.num_cpus}")
        if self.num_gpus is not None and self.num_gpus < 0:
            raise InputError(f"--num-gpus must not be negative, not {self.num_gpus}")
        if self.shard is not None:
            from persona_probe.cluster.sharing import Shard

            Shard.read(self.shard)

    @contextmanager
    def workers(self) -> "Iterator[Workers | None]":
        """The processes that make units, while the block lasts; None: this one.

        Of the processes of `accelerate launch` only the first runs the block; the others end here, when it has.
        """
        if launched():
            if self.ray is not None or self.share or self.shard is not None:
                raise InputError("accelerate launch starts the processes itself: leave out --ray, --share and --shard")
            with self._ranks() as ranks:
                yield ranks
            return
        if self.share or self.shard is not None:
            from persona_probe.cluster.sharing import Shard, Sharing

            yield Sharing() if self.shard is None else Shard.read(self.shard)
            return
        with nullcontext() if self.ray is None else self._ray() as workers:
            yield workers

    @contextmanager
    def _ranks(self) -> "Iterator[Workers]":
        from persona_probe.cluster.launched import LaunchedRanks

        with LaunchedRanks() as ranks:
            if is_first():
                yield ranks
                return
            logging.getLogger("persona_probe").setLevel(logging.ERROR)
            try:
                ranks.follow()
            except InputError as error:  # the first process says it
                raise click.exceptions.Exit(2) from error
        raise click.exceptions.Exit(0)

    def _ray(self) -> Any:
        from persona_probe.cluster.ray_workers import RayWorkers

        return RayWorkers(None if self.ray == HERE else self.ray, self.num_cpus or 1, self.num_gpus)


def crew_options(shards: bool = True, trains: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command with these options; its function receives them as `crew`.

    Args:
        shards: offer --shard: the command has one stage.
        trains: it trains organisms, which several processes of `accelerate launch` can do together.
    """
    options = [
        click.option(
            "--ray",
            is_flag=False,
            flag_value=HERE,
            metavar="[ADDRESS]",
            help="Do the work as Ray tasks: on this machine, or on the cluster at ADDRESS.",
        ),
        click.option("--num-cpus", type=int, help="CPU cores of a Ray task (default 1)."),
        click.option("--num-gpus", type=float, help="GPUs of a Ray task (default 1 on CUDA, else 0)."),
        click.option("--share", is_flag=True, help="Fill the folder together with others that say --share."),
    ]
    if shards:
        options.append(
            click.option("--shard", metavar="N/COUNT", help="Do this share only, from 0/COUNT; `merge` joins them.")
        )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def with_crew(*args: Any, **settings: Any) -> Any:
            names = [name for name in Crew.__dataclass_fields__ if name in settings]
            crew = Crew(**{name: settings.pop(name) for name in names})
            if not trains:
                refuse_launcher()
            return function(*args, crew=crew, **settings)

        decorated: Callable[..., Any] = with_crew
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate
