"""What the registry knows of a figure."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from persona_probe.report.records import Records


@dataclass(frozen=True)
class FigureSpec:
    """One figure: a pure function of records, and the numbers that it draws."""

    name: str
    """File name and anchor."""
    title: str
    """Heading."""
    data: Callable[[Records], pd.DataFrame]
    """The numbers that it draws; empty when its stage has not run."""
    draw: Callable[[Records], Any]
    """The plotly figure (whose traces no type checker can follow); its caption is `fig.layout.meta["caption"]`."""
    missing: str
    """What to say when there is nothing to draw."""
    paper: str = "new"
    """Number of the figure of Wang et al. (2025, arXiv 2506.19823) that it answers to."""
