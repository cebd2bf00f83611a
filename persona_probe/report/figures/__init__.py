"""Figures: pure functions of a run folder's records. `pp.figures.NAME(records)` gives a plotly figure.

Each file of this folder registers its figures with `@figure`: that file is all that a new figure needs.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pandas as pd

from persona_probe.errors import unknown
from persona_probe.report.figures.registry import FigureSpec, registered
from persona_probe.report.printing import for_print as for_print
from persona_probe.report.records import Records

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

FIGURES: dict[str, FigureSpec] = registered("study")
"""The figures of every study by name, in the report's order."""
JUDGED_FIGURES: dict[str, FigureSpec] = registered("judged")
"""Figures of judged answers: a study without any does not show them."""
MORE_FIGURES: dict[str, FigureSpec] = registered("more")
"""Further figures of one study, shown if it has the data for them."""
COLLECTION_FIGURES: dict[str, FigureSpec] = registered("collection")
"""Figures of many runs: a labelled study, several models, planted truth."""
ALL_FIGURES: dict[str, FigureSpec] = FIGURES | JUDGED_FIGURES | MORE_FIGURES | COLLECTION_FIGURES
"""Every figure by name."""


def figures_of(records: Records) -> dict[str, FigureSpec]:
    """The figures that a folder shows: for a study all of `FIGURES`; others only if they have something to draw.

    A folder of other results (a labelled study, planted truth) shows only figures that it has data for.
    """
    others = {name: spec for name, spec in ALL_FIGURES.items() if name not in FIGURES}
    drawable = {name: spec for name, spec in others.items() if not spec.data(records).empty}
    return drawable if "kind" in records.manifest else FIGURES | drawable


def data(name: str, records: Records) -> pd.DataFrame:
    """The numbers that a figure draws.

    Raises:
        InputError: no figure of that name.
    """
    return spec_of(name).data(records)


def spec_of(name: str) -> FigureSpec:
    """A figure by its name.

    Raises:
        InputError: no figure of that name.
    """
    if name not in ALL_FIGURES:
        raise unknown("figure", name, ALL_FIGURES)
    return ALL_FIGURES[name]


# `pp.figures.arms` is the figure, not the file of that name: this replaces what importing the file has put there.
globals().update({name: spec.draw for name, spec in ALL_FIGURES.items()})
__all__ = ["data", "for_print", *ALL_FIGURES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Callable[[Records], Any]:
    """Tells a type checker what the names above are; at run time, only for names that do not exist."""
    raise AttributeError(str(unknown("figure", name, ALL_FIGURES)))
