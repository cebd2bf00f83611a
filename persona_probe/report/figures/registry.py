"""What the report knows of its figures: each registers itself with `@figure`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, TypeVar

import pandas as pd

from persona_probe.names import check_name
from persona_probe.report.records import Records

Group = Literal["study", "judged", "more", "collection"]
"""`study`: of every study. `judged`: of a study with judged answers. `more`: of a study that has the data for them.
`collection`: of many runs."""
Draw = Callable[[Records], Any]
"""Gives a plotly figure (whose traces no type checker can follow)."""
Drawing = TypeVar("Drawing", bound=Draw)


@dataclass(frozen=True)
class FigureSpec:
    """One figure: a pure function of records, and the numbers that it draws."""

    name: str
    """File name and anchor."""
    title: str
    """Heading."""
    data: Callable[[Records], pd.DataFrame]
    """The numbers that it draws; empty when its stage has not run."""
    draw: Draw
    """The plotly figure; its caption is `fig.layout.meta["caption"]`."""
    missing: str
    """What to say when there is nothing to draw."""
    paper: str = "new"
    """Number of the figure of Wang et al. (2025, arXiv 2506.19823) that it answers to."""
    group: Group = "more"
    """Where the report shows it."""
    place: int = 1000
    """Order within its group, smallest first."""

    def __post_init__(self) -> None:
        check_name(self.name, "figure")


Numbers = Callable[[Records], pd.DataFrame]


def computed_once(compute: Numbers) -> Numbers:
    """Keep a figure's numbers with the records they are of: its CSV, its drawing and the report each ask for them."""
    key = f"{compute.__module__}.{compute.__qualname__}"

    @wraps(compute)
    def numbers(records: Records) -> pd.DataFrame:
        kept = vars(records)  # where `cached_property` keeps what it computed, too
        if key not in kept:
            kept[key] = compute(records)
        return kept[key].copy()

    return numbers


_REGISTERED: dict[str, FigureSpec] = {}


def figure(
    *,
    name: str,
    title: str,
    data: Callable[[Records], pd.DataFrame],
    missing: str,
    paper: str = "new",
    group: Group = "more",
    place: int = 1000,
) -> Callable[[Drawing], Drawing]:
    """Register a function of records as the figure `name`; the arguments are the fields of `FigureSpec`."""

    def register(draw: Drawing) -> Drawing:
        _REGISTERED[name] = FigureSpec(name, title, data, draw, missing, paper, group, place)
        return draw

    return register


def registered(group: Group) -> dict[str, FigureSpec]:
    """The figures of a group by name, in the report's order."""
    specs = [spec for spec in _REGISTERED.values() if spec.group == group]
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: (spec.place, spec.name))}
