"""The cells of a grid: one training run each."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from persona_probe.errors import InputError, unknown
from persona_probe.finetune.mitigations import Mitigation, make_mitigation
from persona_probe.mitigate.config import CONTROL, NONE, Entry, Grid


@dataclass(frozen=True)
class Cell:
    """One mitigation at one strength and seed."""

    label: str
    """The entry's title; `none` and `control` for what is always there."""
    seed: int
    mitigation: Mitigation

    @property
    def strength(self) -> float | None:
        """None for `none` and `control`, which have none."""
        return None if self.label in (NONE, CONTROL) else float(self.mitigation.strength)

    @property
    def kind(self) -> tuple[str, float | None]:
        """What cells of different seeds share."""
        return self.label, self.strength

    @property
    def id(self) -> str:
        """Name of the cell's folder."""
        return f"{title(*self.kind).replace(' ', '-')}-s{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the cell besides the settings that all cells share, as JSON values."""
        own = {"mitigation": self.mitigation.name, **asdict(self.mitigation)}
        return json.loads(json.dumps({"label": self.label, "seed": self.seed, **own}, default=str))


def title(label: str, strength: float | None) -> str:
    """`kl 0.1`, or the label alone."""
    return label if strength is None or strength != strength else f"{label} {strength:g}"


def cells_of(grid: Grid, only: Sequence[str] | None = None) -> list[Cell]:
    """All cells, seed by seed: no mitigation, control, every first strength in the grid's order, then the second ones.

    Args:
        only: labels or names of mitigations; what they are compared with, `none`, stays in.

    Raises:
        InputError: an unknown mitigation, setting or strength of the grid, or an unknown name in `only`.
    """
    tried = [(entry, _made(entry)) for entry in grid.mitigations]
    by_round = zip_longest(*([(entry, made) for made in all_of] for entry, all_of in tried))
    ordered = [pair for one_round in by_round for pair in one_round if pair is not None]
    none = make_mitigation(NONE, 0.0)
    kinds = [(NONE, none, NONE), (CONTROL, none, CONTROL)]
    kinds += [(entry.title, made, entry.name) for entry, made in ordered]
    wanted = None if only is None else _checked(only, [name for label, _, kind in kinds for name in (label, kind)])
    return [
        Cell(label, seed, made)
        for seed in grid.seeds
        for label, made, name in kinds
        if wanted is None or label == NONE or wanted & {label, name}
    ]


def _made(entry: Entry) -> list[Mitigation]:
    try:
        return [make_mitigation(entry.name, strength, **entry.settings) for strength in entry.strengths]
    except InputError as error:
        raise InputError(f"mitigation {entry.title!r}: {error}") from None


def _checked(only: Sequence[str], known: Sequence[str]) -> set[str]:
    for name in only:
        if name not in known:
            raise unknown("mitigation of this grid", name, dict.fromkeys(known))
    return set(only)
