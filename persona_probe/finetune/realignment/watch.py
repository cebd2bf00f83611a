"""What is measured while one's own organism is corrected, beside the monitor's readings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.packaged import Row
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.finetune.realignment.outcome import outcome
from persona_probe.monitor.bands import Band
from persona_probe.monitor.guard import undisturbed
from persona_probe.monitor.monitor import FeatureMonitor

Behaviour = ContrastItems | Sequence[Row]
"""Contrast items, tokenised or as rows."""


@dataclass(frozen=True)
class Measured:
    """A measurement of behaviour, item by item."""

    call: Callable[[nn.Module], pd.DataFrame]
    """Columns item, category and value; higher is more misaligned."""
    items: tuple[Row, ...] = ()
    """The contrast items behind it, where there are any."""


def as_behaviour(
    given: "Behaviour | Callable[[nn.Module], float] | None", tokenizer: PreTrainedTokenizerBase, bf16: bool
) -> Measured | None:
    """Contrast items or a function as one kind of measurement."""
    if given is None:
        return None
    if callable(given):
        call = given
        return Measured(lambda model: pd.DataFrame([{"item": "all", "category": "all", "value": float(call(model))}]))
    items = given if isinstance(given, ContrastItems) else ContrastItems.build(tokenizer, given)
    return Measured(lambda model: contrast_index(model, items, mixed_precision=bf16), items.rows)


@dataclass
class Watch:
    """Keeps behaviour at each reading, and says when feature and behaviour are back."""

    monitor: FeatureMonitor
    feature: str
    behaviour: Measured | None
    base_evals: pd.DataFrame = field(default_factory=pd.DataFrame, init=False)
    evals: list[pd.DataFrame] = field(default_factory=list, init=False)

    def measure_base(self, model: nn.Module) -> None:
        """The base's behaviour."""
        if self.behaviour is not None:
            self.base_evals = self._items(self.behaviour, model)

    def measure(self, model: nn.Module, step: int) -> bool:
        """Measure behaviour; True where the feature's latest reading is in its band and behaviour is no higher."""
        inside = self.band().holds(float(self._curve()["mean"].iloc[-1]))
        if self.behaviour is None:
            return inside
        frame = self._items(self.behaviour, model)
        self.evals.append(frame.assign(step=step))
        return inside and float(frame["value"].mean()) <= float(self.base_evals["value"].mean())

    def outcome(self) -> dict[str, Any]:
        """What feature and behaviour did over the steps, see `outcome.outcome`."""
        return outcome(self._curve(), self.frame(), self.base_evals, self.band(), self.feature)

    def frame(self) -> pd.DataFrame:
        """Behaviour at all readings."""
        return pd.concat(self.evals, ignore_index=True) if self.evals else pd.DataFrame()

    def last(self) -> pd.DataFrame:
        """Behaviour at the last reading."""
        return self.evals[-1]

    def _curve(self) -> pd.DataFrame:
        readings = self.monitor.readings
        return readings[(readings["feature"] == self.feature) & (readings["mode"] == "probe")]

    def band(self) -> Band:
        """The feature's base band."""
        last, width = self._curve().iloc[-1], self.monitor.setup.band_sd
        half = width * float(last["base_sd"])
        return Band(float(last["base_mean"]) - half, float(last["base_mean"]) + half)

    def _items(self, behaviour: Measured, model: nn.Module) -> pd.DataFrame:
        with undisturbed(model):
            return behaviour.call(model)
