"""What a correction is: which rows, how many, chosen how, trained how. Checked here, before anything is loaded."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from persona_probe.config import StudyConfig
from persona_probe.errors import InputError, unknown

CHOICES = ("random", "projection_gap", "perplexity_gap", "diversity")
"""How corrective rows are chosen; see `choose`."""
METHODS = ("continued", "fresh", "full")
"""What is trained; see `methods`."""


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
    """Stop after so many readings in a row with feature and behaviour back; 0 never stops."""

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("no corrective data: name a packaged set or a file")
        check_choice(self.rows, self.choose_by, self.method)
        if any(not 0 <= step <= self.steps for step in self.readings):
            raise InputError(f"readings must lie between 0 and {self.steps} steps, not {list(self.readings)}")
        if self.steps < 1 or self.batch_size < 1 or not self.lr > 0:
            raise InputError("a correction needs steps and batch_size of at least 1, and a positive lr")

    @classmethod
    def of_study(cls, config: StudyConfig, data: str | Sequence[str], **changes: Any) -> "Correction":
        """A correction with the study's own settings where `changes` does not say otherwise."""
        realign = config.realign
        settings: dict[str, Any] = {
            "steps": realign.steps,
            "batch_size": realign.batch_size,
            "lr": config.training.lr if realign.lr is None else realign.lr,
            "readings": realign.readings,
            "stop_readings": realign.stop_readings,
        }
        return cls(named_sets(data), **{**settings, **{k: v for k, v in changes.items() if v is not None}})

    @property
    def schedule(self) -> tuple[int, ...]:
        """Steps that are read: the wanted ones, the start and the end."""
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
