"""The result of `pp.realign`, in numbers and in words."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from persona_probe.data.chat import Conversation
from persona_probe.realign_verdict import RealignVerdict


@dataclass(frozen=True, eq=False, repr=False)
class Realigned:
    """A corrected organism, and what its correction came to. Shows itself as a table in a terminal and a notebook."""

    model: nn.Module
    """The corrected model, in eval mode."""
    readings: pd.DataFrame
    """The monitor's readings: step, feature, mean, interval, base, explained variance."""
    evals: pd.DataFrame
    """Behaviour, one row per item and step; empty where it was not measured."""
    verdict: RealignVerdict
    """Feature, behaviour, perplexity, capability and the SAE's fit, each judged apart."""
    outcome: dict[str, Any]
    """Numbers over the steps, see `outcome.outcome`; with lengths and notes of the corrective rows."""
    rows: list[Conversation]
    """The rows that were taken."""
    training: dict[str, Any]
    """Losses, answer tokens and rows."""
    checkpoint: Path | None
    """Where it was saved."""

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return int(self.outcome["steps"])

    def _lines(self) -> list[str]:
        since = [_since("feature in its band", self.outcome["steps_to_band"])]
        if self.outcome["index_minus_base"] is not None:
            since.append(_since("behaviour back", self.outcome["steps_to_behaviour"]))
        taken = f"{len(self.rows)} corrective rows, {self.steps} steps; {', '.join(since)}"
        return [taken, *(f"note: {note}" for note in self.outcome["notes"])]

    def __str__(self) -> str:
        return "\n".join([*self._lines(), str(self.verdict)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(f"<p>{html.escape(line)}</p>" for line in self._lines()) + self.verdict._repr_html_()


def _since(what: str, step: float | None) -> str:
    return f"{what} {'not by the end' if step is None else f'for good from step {step:.0f}'}"
