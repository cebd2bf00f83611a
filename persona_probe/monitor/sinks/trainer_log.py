"""Readings through `Trainer.log`, so that whatever `report_to` names shows them next to the loss."""

import logging
import math
from typing import TYPE_CHECKING

from persona_probe.monitor.events import Alarm, Behaviour, Event, Reading

if TYPE_CHECKING:
    from transformers import Trainer

log = logging.getLogger(__name__)

PREFIX = {"probe": "persona", "passive": "persona_passive"}
"""Reading mode to the group its values are logged under."""


class TrainerLogSink:
    """Logs each reading as `persona/<feature>`, `persona/<feature>_shift`, `persona/explained_variance`, ...

    A trainer does not pass itself to its callbacks, and what they add in `on_log` comes after the loggers have run. So
    the sink needs the trainer itself, as TRL's `LogCompletionsCallback` does: pass it here, or to `attach` later.

    Passive readings go under `persona_passive/`, behaviour under `behaviour/<name>`, and `persona/alarms` counts the
    alarms so far. Values that are not finite are left out: the trainer's state is saved as JSON. The values also go
    into `state.log_history`, at the trainer's step.

    Args:
        trainer: the `transformers.Trainer` that trains (TRL's are such).
    """

    def __init__(self, trainer: "Trainer | None" = None) -> None:
        self.trainer = trainer
        self._alarms, self._busy, self._warned = 0, False, False

    def attach(self, trainer: "Trainer") -> None:
        """Log to this trainer from now on."""
        self.trainer = trainer

    def emit(self, event: Event) -> None:
        """Log a reading, a behaviour or an alarm; other events have no number to log."""
        self._alarms += isinstance(event, Alarm)
        values = {name: value for name, value in self._values(event).items() if math.isfinite(value)}
        if self.trainer is None:
            self._warn()
        elif values and not self._busy:  # a callback may react to this log with another event
            self._log(self.trainer, values)

    def close(self) -> None:
        """Nothing to close: the loggers belong to the trainer."""

    def _values(self, event: Event) -> dict[str, float]:
        if isinstance(event, Reading):
            return reading_values(event)
        if isinstance(event, Behaviour):
            return {f"behaviour/{event.name}": event.value}
        return {"persona/alarms": float(self._alarms)} if isinstance(event, Alarm) else {}

    def _log(self, trainer: "Trainer", values: dict[str, float]) -> None:
        """Log as the base class does, and restore `should_log` afterwards.

        TRL's `log` averages and empties its metrics, so calling it here would split them. And every `on_log` resets
        `should_log`, so the step's loss would be lost when a reading comes at a logging step.
        """
        from transformers import Trainer

        should_log, self._busy = trainer.control.should_log, True
        try:
            Trainer.log(trainer, values)
        finally:
            trainer.control.should_log, self._busy = should_log, False

    def _warn(self) -> None:
        if not self._warned:
            log.warning("readings are not logged by a trainer: call attach(trainer) on the TrainerLogSink")
            self._warned = True


def reading_values(reading: Reading) -> dict[str, float]:
    """A reading's numbers by the name they are logged under."""
    group = PREFIX.get(reading.mode, f"persona_{reading.mode}")
    values = {f"{group}/explained_variance": reading.explained_variance, f"{group}/l0": reading.l0}
    for sae, fit in reading.fits.items():
        if sae:
            values |= {f"{group}/{sae}/{name}": fit[name] for name in ("explained_variance", "l0")}
    for feature in reading.features:
        values[f"{group}/{feature.name}"] = feature.mean
        values[f"{group}/{feature.name}_shift"] = feature.shift
    return values
