"""The plan of a grid of corrections: data x dose x choice x method x seed, from YAML. Order is the plan's own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from persona_probe.config import StudyConfig
from persona_probe.errors import InputError
from persona_probe.finetune.realignment.spec import Correction, check_choice, named_sets, slug


@dataclass(frozen=True)
class Block:
    """All combinations of some data sets, doses, choices and methods."""

    data: tuple[str, ...]
    """Sets, each on its own; `a+b` joins two."""
    rows: tuple[int, ...]
    """Doses."""
    choose_by: tuple[str, ...] = ("random",)
    """Choices."""
    method: tuple[str, ...] = ("continued",)
    """Methods."""
    lr: float | None = None
    """Learning rate; None takes the plan's."""

    def __post_init__(self) -> None:
        if not (self.data and self.rows and self.choose_by and self.method):
            raise InputError("a block needs at least one of data, rows, choose_by and method")
        for rows in self.rows:
            for choice in self.choose_by:
                for method in self.method:
                    check_choice(rows, choice, method)

    def combinations(self) -> Iterator[dict[str, Any]]:
        """What each cell of the block changes; data vary slowest, doses fastest."""
        for data in self.data:
            for method in self.method:
                for choice in self.choose_by:
                    for rows in self.rows:
                        yield {"data": data, "rows": rows, "choose_by": choice, "method": method, "lr": self.lr}


@dataclass(frozen=True)
class DosePlan:
    """A grid of corrections of one study's organisms."""

    name: str
    """Stands before each cell's name."""
    blocks: tuple[Block, ...]
    """In the order in which they are run: a cell that two blocks name is run once."""
    seeds: tuple[int, ...] = (0,)
    """The study's seeds to be corrected; all cells of one seed come before the next."""
    steps: int | None = None
    """Most steps; None takes the study's."""
    batch_size: int | None = None
    """Rows per step; None takes the study's."""
    lr: float | None = None
    """Learning rate; None takes the study's."""
    readings: tuple[int, ...] | None = None
    """Steps that are read; None takes the study's."""
    stop_readings: int = 0
    """0: all cells take the same number of steps, so that their ends compare."""

    def __post_init__(self) -> None:
        if not self.blocks or not self.seeds:
            raise InputError("a plan needs blocks and seeds")
        if slug(self.name) != self.name:
            raise InputError(f"name {self.name!r} is no folder's name: write letters, digits, dots and dashes")

    def cells(self, config: StudyConfig) -> list[tuple[int, str, Correction]]:
        """Seed, name and correction of every cell, in order, each once.

        Raises:
            InputError: a seed that the study does not have, or settings that do not fit together.
        """
        if missing := [seed for seed in self.seeds if seed not in config.seeds]:
            raise InputError(f"the study has no seed {missing[0]}: its seeds are {list(config.seeds)}")
        shared = {key: getattr(self, key) for key in ("steps", "batch_size", "readings", "stop_readings")}
        found: dict[tuple[int, str], Correction] = {}
        for seed in self.seeds:
            for block in self.blocks:
                for changes in block.combinations():
                    lr = self.lr if changes["lr"] is None else changes["lr"]
                    settings = {**shared, **changes, "lr": lr}
                    data = named_sets(settings.pop("data"))
                    correction = Correction.of_study(config, data, **settings)
                    key = (seed, f"{self.name}-{correction.name}")
                    if found.setdefault(key, correction) != correction:
                        raise InputError(f"two cells are called {key[1]!r} and differ: drop one of them")
        return [(seed, name, correction) for (seed, name), correction in found.items()]
