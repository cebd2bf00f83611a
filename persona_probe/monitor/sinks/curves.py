"""Curves where people look: TensorBoard, W&B, trackio and Lightning's loggers, in a section `persona` of their own."""

import logging
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persona_probe.errors import InputError
from persona_probe.monitor.band import Bands, beyond_chance
from persona_probe.monitor.events import Alarm, Behaviour, Event, FeatureValue, Reading, Start

log = logging.getLogger(__name__)

# --- What is drawn

PREFIX = {"probe": "persona", "passive": "persona_passive"}
"""Reading mode to the group its values are logged under."""
ALARMS = "persona/alarms"


def reading_values(reading: Reading) -> dict[str, float]:
    """A reading's numbers by the name they are logged under: of each feature its mean and its shift."""
    group = _group(reading)
    values = {f"{group}/explained_variance": reading.explained_variance, f"{group}/l0": reading.l0}
    for sae, fit in reading.fits.items():
        if sae:
            values |= {f"{group}/{sae}/{name}": fit[name] for name in ("explained_variance", "l0")}
    for feature in reading.features:
        values[f"{group}/{feature.name}"] = feature.mean
        values[f"{group}/{feature.name}_shift"] = feature.shift
    return values


def limits(reading: Reading, bands: Bands) -> dict[str, float]:
    """What lies around a feature's mean: its 95% interval, and the band that counts as normal."""
    values = {}
    for feature in reading.features:
        name = f"{_group(reading)}/{feature.name}"
        values |= {f"{name}_ci_low": feature.ci_low, f"{name}_ci_high": feature.ci_high}
        low, high = _band(feature, bands)
        values |= {f"{name}_band_low": low, f"{name}_band_high": high}
    return values


def _band(feature: FeatureValue, bands: Bands) -> tuple[float, float]:
    return beyond_chance(*bands[feature.name], feature) if feature.name in bands else (math.nan, math.nan)


def _group(reading: Reading) -> str:
    return PREFIX.get(reading.mode, f"persona_{reading.mode}")


class CurveSink(ABC):
    """What sinks of curves share: the values of a step are collected, and written at once.

    Logged are `persona/<feature>` with `_shift`, `_ci_low`, `_ci_high`, `_band_low` and `_band_high`, the SAE's
    `persona/explained_variance` and `persona/l0`, and `persona/alarms`: the number of alarms so far, 0 for none.
    Passive readings go under `persona_passive/`, behaviour under `behaviour/<name>`. Values that are not finite are
    left out.
    """

    def __init__(self) -> None:
        self._bands: Bands = {}
        self._alarms, self._step = 0, 0
        self._values: dict[str, float] = {}
        self._limits: dict[str, float] = {}

    def emit(self, event: Event) -> None:
        """Collect the numbers of an event; those of an earlier step are written first."""
        if isinstance(event, Start):
            self.flush()
            self._bands, self._alarms = event.bands, 0
            return
        if event.step != self._step:
            self.flush()
        self._step = event.step
        if isinstance(event, Reading):
            self._values |= {**_finite(reading_values(event)), ALARMS: float(self._alarms)}
            self._limits |= _finite(limits(event, self._bands))
        elif isinstance(event, Behaviour):
            self._values |= _finite({f"behaviour/{event.name}": event.value})
        elif isinstance(event, Alarm):
            self._alarms += 1
            self._values[ALARMS] = float(self._alarms)

    def flush(self) -> None:
        """Write the values of the step; the monitor calls it when a step is concluded."""
        values, bounds, self._values, self._limits = self._values, self._limits, {}, {}
        if values:
            self._write(values, bounds, self._step)

    def close(self) -> None:
        """Write what was not written yet."""
        self.flush()

    @abstractmethod
    def _write(self, values: dict[str, float], bounds: dict[str, float], step: int) -> None:
        """Write the values of a step, and the intervals and bands around them."""


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


# --- Sinks for a loop of one's own


class TensorBoardSink(CurveSink):
    """Curves in TensorBoard, at the training's own steps.

    ```python
    pp.FeatureMonitor(sae, features, sinks=[TensorBoardSink("runs/mine")])
    ```

    Args:
        target: a folder for event files, or a `SummaryWriter` of the caller's, which stays open.
    """

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.folder = Path(target) if isinstance(target, str | Path) else None
        self._writer: Any = None if self.folder is not None else target

    def _write(self, values: dict[str, float], bounds: dict[str, float], step: int) -> None:
        if self._writer is None:
            self._writer = _summary_writer()(str(self.folder))
        write_scalars(self._writer, {**values, **bounds}, step)

    def close(self) -> None:
        """Write what is left, and close the file that this sink opened; a later event opens another one."""
        super().close()
        if self.folder is not None and self._writer is not None:
            self._writer.close()
            self._writer = None


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("TensorBoardSink needs tensorboard: pip install tensorboard") from error
    return SummaryWriter


def write_scalars(writer: Any, values: dict[str, float], step: int) -> None:
    """Add scalars at a step, and flush."""
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    writer.flush()


class WandbSink(CurveSink):
    """Curves in a W&B run. They ride on the loop's next `wandb.log`, so that no step of it is used up.

    Only where a second reading comes before the loop logs, the first is committed as a row of its own. Its x-axis is
    `persona/step`, the training's step, whatever W&B counts.

    Args:
        run: a run; None takes the one that is active.
    """

    def __init__(self, run: Any = None) -> None:
        super().__init__()
        self.run = run
        self._waiting: tuple[Any, int] | None = None

    def _write(self, values: dict[str, float], bounds: dict[str, float], step: int) -> None:
        run = self.run or active_wandb()
        if run is None:
            raise InputError("WandbSink has no run: call wandb.init() before training, or pass run=")
        if self._waiting is None or self._waiting[0] is not run:
            run.define_metric("persona/step", hidden=True)
            for name in ("persona/*", "persona_passive/*", "behaviour/*"):
                run.define_metric(name, step_metric="persona/step")
        elif self._waiting[1] == run.step:  # the loop has not logged since
            run.log({}, commit=True)
        run.log({**values, **bounds, "persona/step": step}, commit=False)
        self._waiting = run, run.step


class TrackioSink(CurveSink):
    """Curves in a trackio run, at the step that the loop logged last, so that no step of it is used up.

    What comes before the loop's first log waits for it. `persona/step` is the training's step.

    Args:
        run: a run; None takes the one that is active.
    """

    def __init__(self, run: Any = None) -> None:
        super().__init__()
        self.run = run
        self._held: list[dict[str, float]] = []

    def _write(self, values: dict[str, float], bounds: dict[str, float], step: int) -> None:
        run = self.run or active_trackio()
        if run is None:
            raise InputError("TrackioSink has no run: call trackio.init() before training, or pass run=")
        self._held.append({**values, **bounds, "persona/step": step})
        self._held = log_beside(run, self._held)

    def close(self) -> None:
        """Write what is left."""
        super().close()
        run = self.run or active_trackio()
        if run is not None and self._held:
            log_beside(run, self._held, force=True)
        self._held = []


def log_beside(run: Any, rows: list[dict[str, float]], force: bool = False) -> list[dict[str, float]]:
    """Log rows at the step that a trackio run has reached; returns those that must wait because it has none yet.

    Args:
        force: log them in any case, because there is no later.
    """
    following = getattr(run, "_next_step", None)  # trackio tells it nowhere else
    if following == 0 and not force:
        return rows
    for row in rows:
        run.log(row, step=None if following is None else max(0, following - 1))
    return []


class LoggersSink(CurveSink):
    """Curves through Lightning's loggers; `LightningMonitor` adds it by itself.

    Args:
        loggers: of a module (`module.loggers`) or a trainer.
    """

    def __init__(self, loggers: Sequence[Any]) -> None:
        super().__init__()
        self.loggers = list(loggers)

    def _write(self, values: dict[str, float], bounds: dict[str, float], step: int) -> None:
        for logger in self.loggers:
            logger.log_metrics({**values, **bounds}, step=step)


# --- Alarms where a tracker is in use


class AlertSink:
    """Sends each alarm to the W&B and trackio runs that are active (`wandb.alert`, `trackio.alert`).

    A monitor has one unless `log=False`. Neither library is imported for it.
    """

    def emit(self, event: Event) -> None:
        """Send an alarm; other events are none."""
        if not isinstance(event, Alarm):
            return
        title = f"persona_probe: {event.rule} at step {event.step}"
        for run in (active_wandb(), active_trackio()):
            if run is not None:
                run.alert(title=title, text=event.message)

    def close(self) -> None:
        """Nothing to close: the runs belong to the caller."""


def active_wandb() -> Any:
    """The W&B run that is active, if somebody imported wandb."""
    return getattr(sys.modules.get("wandb"), "run", None)


def active_trackio() -> Any:
    """The trackio run that is active, if somebody imported trackio."""
    context = getattr(sys.modules.get("trackio"), "context_vars", None)
    current = getattr(context, "current_run", None)
    return None if current is None else current.get()
