"""What a correction is: which rows, how many, how they are chosen and trained; checked before anything is loaded."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persona_probe.config import StudyConfig, Training, check_finite, check_least, check_seeds
from persona_probe.errors import InputError, unknown
from persona_probe.names import check_name

CHOICES = ("random", "projection_gap", "perplexity_gap", "diversity")
"""How corrective rows are chosen; see `rows.choose_rows`."""
METHODS = ("continued", "fresh", "full")
"""What is trained; see `realignment.methods`."""


@dataclass(frozen=True)
class Correction:
    """One corrective fine-tune of a study's organism; the organism and the correction have the same seed."""

    data: tuple[str, ...]
    """Packaged sets or files, joined."""
    rows: int | None = None
    """The dose; None takes all rows."""
    choose_by: str = "random"
    """`random`, `projection_gap`, `perplexity_gap` or `diversity`."""
    method: str = "continued"
    """`continued` (the organism's own adapter or weights), `fresh` (a new LoRA on top) or `full` (all weights)."""
    steps: int = 35
    """Most steps taken."""
    batch_size: int = 4
    """Rows per step."""
    lr: float = 1e-4
    """Learning rate."""
    readings: tuple[int, ...] = (0, 5, 10, 20, 35)
    """Steps at which the monitor reads and the contrast index is taken."""
    stop_readings: int = 0
    """Stop after this many readings in a row with feature and behaviour back; 0 never stops."""

    def __post_init__(self) -> None:
        check_finite(self)
        if not self.data:
            raise InputError("no corrective data: name a packaged set or a file")
        check_choice(self.rows, self.choose_by, self.method)
        if any(not 0 <= step <= self.steps for step in self.readings):
            raise InputError(f"readings must lie between 0 and {self.steps} steps, not {list(self.readings)}")
        if self.steps < 1 or self.batch_size < 1 or not self.lr > 0:
            raise InputError("a correction needs steps and batch_size of at least 1, and a positive lr")

    @classmethod
    def of_study(cls, config: StudyConfig, data: str | Sequence[str], **changes: Any) -> "Correction":
        """A correction with the study's own settings except for `changes`."""
        realign = config.realign
        settings: dict[str, Any] = {
            "steps": realign.steps,
            "batch_size": realign.batch_size,
            "lr": config.training.lr if realign.lr is None else realign.lr,
            "readings": realign.readings,
            "stop_readings": realign.stop_readings,
        }
        return cls(named_sets(data), **{**settings, **{k: v for k, v in changes.items() if v is not None}})

    @classmethod
    def given(
        cls, config: StudyConfig, data: str | Sequence[str] | None, name: str | None = None, **changes: Any
    ) -> "Correction | None":
        """What a caller asks for: a correction with `data`; without, None for the config's arms.

        Raises:
            InputError: a name or a change without data.
        """
        if data is not None:
            return cls.of_study(config, data, **changes)
        if without := [key for key, value in {**changes, "name": name}.items() if value is not None]:
            raise InputError(f"{without[0]} needs corrective data: name a packaged set or a file")
        return None

    @classmethod
    def of_arm(cls, config: StudyConfig, arm: str) -> "Correction":
        """The correction that a corrective arm of the config is; `data` names its rows, which the arm may mix."""
        never = {"stop_readings": 0} if arm == config.realign.benign else {}
        return cls.of_study(config, [config.realign.arms[arm].named], **never)

    def training(self, training: Training) -> Training:
        """`training` with this correction's length, batches and learning rate."""
        return training.further(self.steps, self.batch_size, self.lr)

    @property
    def schedule(self) -> tuple[int, ...]:
        """Steps that are read: `readings`, the start and the end."""
        return tuple(sorted({0, self.steps, *self.readings}))

    @property
    def name(self) -> str:
        """A folder's name that tells data, dose, choice and method."""
        sets = "+".join(slug(Path(s).stem if "/" in s or Path(s).is_file() else s) for s in self.data)
        return f"{sets}-{self.rows or 'all'}-{self.choose_by}-{self.method}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def named_sets(data: str | Sequence[str]) -> tuple[str, ...]:
    """The sets of `a+b`, or of a list; the name of a file that exists is taken whole."""
    specs = [data] if isinstance(data, str) else list(data)
    return tuple(part for s in specs for part in ([s] if Path(s).exists() else s.split("+")) if part)


def check_choice(rows: int | None, choose_by: str, method: str) -> None:
    """Refuse a dose below 1, an unknown choice or an unknown method.

    Raises:
        InputError: with near matches for a name.
    """
    if choose_by not in CHOICES:
        raise unknown("choice of rows", choose_by, CHOICES)
    if method not in METHODS:
        raise unknown("realign method", method, METHODS)
    if rows is not None and rows < 1:
        raise InputError(f"rows must be at least 1, not {rows}")


def slug(text: str) -> str:
    """A text as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.") or "data"


# --- The plan of a grid of corrections: data x dose x choice x method x seed, from YAML


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
        check_finite(self)
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"lr must be positive, not {self.lr}")
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
    """Prefix of each cell's name."""
    blocks: tuple[Block, ...]
    """In the order in which they run; a cell that two blocks name runs once."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the study to correct; all cells of one seed come before the next."""
    steps: int | None = None
    """Most steps; None takes the study's."""
    batch_size: int | None = None
    """Rows per step; None takes the study's."""
    lr: float | None = None
    """Learning rate; None takes the study's."""
    readings: tuple[int, ...] | None = None
    """Steps of the readings; None takes the study's."""
    stop_readings: int = 0
    """With 0 all cells take the same number of steps, so their ends can be compared."""

    def __post_init__(self) -> None:
        check_finite(self)
        check_least(self, 1, "steps", "batch_size")
        check_least(self, 0, "stop_readings")
        if not self.blocks:
            raise InputError("a plan needs blocks: write at least one")
        check_seeds(self.seeds)
        if self.lr is not None and not self.lr > 0:
            raise InputError(f"lr must be positive, not {self.lr}")
        check_name(self.name, "the plan's name", also="+")

    def cells(self, config: StudyConfig) -> list[tuple[int, str, Correction]]:
        """Seed, name and correction of every cell, in order, each once.

        Raises:
            InputError: a seed that the study does not have, or settings that do not fit together.
        """
        if missing := [seed for seed in self.seeds if seed not in config.seeds]:
            raise InputError(f"the study has no seed {missing[0]}: its seeds are {list(config.seeds)}")
        shared = {key: getattr(self, key) for key in ("steps", "batch_size", "readings", "stop_readings")}
        cells: dict[tuple[int, str], Correction] = {}
        for seed in self.seeds:
            for block in self.blocks:
                for changes in block.combinations():
                    lr = self.lr if changes["lr"] is None else changes["lr"]
                    settings = {**shared, **changes, "lr": lr}
                    data = named_sets(settings.pop("data"))
                    correction = Correction.of_study(config, data, **settings)
                    key = (seed, f"{self.name}-{correction.name}")
                    if cells.setdefault(key, correction) != correction:
                        raise InputError(f"two cells are called {key[1]!r} and differ: drop one of them")
        return [(seed, name, correction) for (seed, name), correction in cells.items()]


# --- The settings of stress tests

RELEARN_STEPS = (1, 2, 3, 5, 8, 12, 16, 20)
"""Steps at which a re-misalignment is read."""


@dataclass(frozen=True)
class StressSettings:
    """How hard stress tests press."""

    trigger_draws: int = 2
    """Training questions that serve as the first turn, one after the other."""
    bad_rows: int = 8
    """Rows of the re-misalignment."""
    relearn_steps: tuple[int, ...] = RELEARN_STEPS
    """Steps at which it is read."""
    relearn_seeds: tuple[int, ...] = (0, 1)
    """Its seeds: rows and fresh adapter."""
    back_at: float = 0.5
    """Share of the organism's rise over the base that counts as back."""
    length_rows: int = 32
    """Corrective rows of the length test."""
    latents: int = 4
    """Changed latents tested for cause, and as many random ones."""
    drift_factor: int = 4
    """Total corrective training, as a multiple of the correction's."""

    def __post_init__(self) -> None:
        check_finite(self)
        check_seeds(self.relearn_seeds, "relearn_seeds")
        if not self.relearn_steps or min(self.relearn_steps) < 1:
            raise InputError("re-misalignment needs at least one seed and steps from 1 up")
        if not 0 < self.back_at <= 1:
            raise InputError(f"back_at is {self.back_at}: give a share of the organism's rise, above 0 and at most 1")
        for name in ("trigger_draws", "bad_rows", "length_rows", "latents", "drift_factor"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 or more")
