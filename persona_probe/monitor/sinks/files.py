"""A file of events, one JSON line each: appended and flushed, so that a killed run loses at most one line."""

import logging
import math
import os
from collections.abc import Iterable, Mapping
from io import FileIO
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

from rich.console import Console
from rich.text import Text

from persona_probe.errors import InputError
from persona_probe.monitor.events import (
    Alarm,
    Behaviour,
    End,
    Event,
    Fault,
    FeatureValue,
    Reading,
    Start,
    from_line,
    to_line,
)

if TYPE_CHECKING:
    import pandas as pd
    from transformers import Trainer

log = logging.getLogger(__name__)

BLOCK = 65_536
"""Bytes read at a time when looking back for the last line's start."""


class JsonlSink:
    """Appends every event to a file as one line of `to_line`.

    A file that exists is continued: a last line that was torn by a kill is cut off first, a whole one that only lacks
    its line break gets it. Nothing whole is lost.

    Args:
        path: the file; its folders are made.
        fsync: also wait until each line is on the disk (survives a crash of the machine, not only of the run).

    Raises:
        InputError: `path` is a folder.
    """

    def __init__(self, path: str | Path, fsync: bool = False) -> None:
        self.path, self.fsync = Path(path), fsync
        if self.path.is_dir():
            raise InputError(f"{self.path} is a folder: give the path of a file, e.g. {self.path / 'readings.jsonl'}")
        self._file: FileIO | None = None

    def emit(self, event: Event) -> None:
        """Append one line. Unbuffered: a line goes out in one write or raises, it is never half kept back."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            recover(self.path)
            self._file = self.path.open("ab", buffering=0)
        line = to_line(event).encode()
        if self._file.write(line) != len(line):
            raise OSError(f"{self.path}: no space for another line")
        if self.fsync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a later `emit` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def recover(path: Path) -> None:
    """Make a file of events end with a whole line: cut a torn last line off, or give a whole one its line break."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open("r+b") as handle:
        start = _last_line_start(handle)
        handle.seek(start)
        last = handle.read()
        if not last:
            return
        if _is_event(last):
            handle.write(b"\n")
            return
        handle.truncate(start)
    log.warning("%s ended in a torn line of %d bytes: cut off", path, len(last))


def read_events(path: str | Path) -> list[Event]:
    """All events of a file, in order; a torn last line is ignored.

    Raises:
        InputError: no such file, or a line before the last that is no event.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"no events at {file}: give the JSONL file that a FeatureMonitor wrote")
    *whole, last = file.read_bytes().split(b"\n")
    events = [_event(file, number, line) for number, line in enumerate(whole, 1) if line.strip()]
    return [*events, from_line(last.decode())] if _is_event(last) else events


def readings_frame(events: Iterable[Event]) -> "pd.DataFrame":
    """All readings as a table, one row per reading and feature (`Reading.rows`); no columns where there are none."""
    import pandas as pd

    return pd.DataFrame([row for event in events if isinstance(event, Reading) for row in event.rows()])


def _event(file: Path, number: int, line: bytes) -> Event:
    try:
        return from_line(line.decode())
    except ValueError as error:
        raise InputError(f"{file}, line {number} is damaged ({error}): remove it, or read another file") from error


def _is_event(line: bytes) -> bool:
    try:
        from_line(line.decode())
    except ValueError:
        return False
    return True


def _last_line_start(handle: BinaryIO) -> int:
    end = handle.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - BLOCK)
        handle.seek(start)
        if (found := handle.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


# --- Readings through `Trainer.log`, so that whatever `report_to` names shows them beside the loss

logger = logging.getLogger(__name__)

PREFIX = {"probe": "persona", "passive": "persona_passive"}
"""Reading mode to the group its values are logged under."""


class TrainerLogSink:
    """Logs each reading as `persona/<feature>`, `persona/<feature>_shift`, `persona/explained_variance`, ...

    A callback is never told its trainer, and what it adds in `on_log` comes after the loggers have run. So the sink
    needs the trainer itself, as TRL's `LogCompletionsCallback` does: give it here, or to `attach` once it exists.

    Passive readings go under `persona_passive/`, behaviour under `behaviour/<name>`, and `persona/alarms` counts the
    alarms so far. Values that are not finite are left out: the trainer's state is saved as JSON. The values also go
    into `state.log_history`, at the trainer's own step.

    Args:
        trainer: the `transformers.Trainer` that trains (TRL's are such).
    """

    def __init__(self, trainer: "Trainer | None" = None) -> None:
        self.trainer = trainer
        self._alarms, self._busy, self._told = 0, False, False

    def attach(self, trainer: "Trainer") -> None:
        """Log to this trainer from now on."""
        self.trainer = trainer

    def emit(self, event: Event) -> None:
        """Log a reading, a behaviour or an alarm; other events have no number to show."""
        self._alarms += isinstance(event, Alarm)
        values = {name: value for name, value in self._values(event).items() if math.isfinite(value)}
        if self.trainer is None:
            self._tell()
        elif values and not self._busy:  # a callback may answer our log with another event
            self._log(self.trainer, values)

    def close(self) -> None:
        """Nothing to close: the loggers are the trainer's own."""

    def _values(self, event: Event) -> dict[str, float]:
        if isinstance(event, Reading):
            return reading_values(event)
        if isinstance(event, Behaviour):
            return {f"behaviour/{event.name}": event.value}
        return {"persona/alarms": float(self._alarms)} if isinstance(event, Alarm) else {}

    def _log(self, trainer: "Trainer", values: dict[str, float]) -> None:
        """Log as the base class does, and keep the wish to log the loss.

        TRL's own `log` averages and empties its metrics, so calling it here would split them; and any `on_log` takes
        `should_log` back, so that the step's loss would be lost when a reading comes at a logging step.
        """
        from transformers import Trainer

        wished, self._busy = trainer.control.should_log, True
        try:
            Trainer.log(trainer, values)
        finally:
            trainer.control.should_log, self._busy = wished, False

    def _tell(self) -> None:
        if not self._told:
            logger.warning("readings are not logged by a trainer: call attach(trainer) on the TrainerLogSink")
            self._told = True


def reading_values(reading: Reading) -> dict[str, float]:
    """A reading's numbers by the name they are logged under."""
    group = PREFIX.get(reading.mode, f"persona_{reading.mode}")
    values = {f"{group}/explained_variance": reading.explained_variance, f"{group}/l0": reading.l0}
    for feature in reading.features:
        values[f"{group}/{feature.name}"] = feature.mean
        values[f"{group}/{feature.name}_shift"] = feature.shift
    return values


# --- One line per reading in the terminal

STATES = {"above": "bold yellow", "below": "bold yellow", "inside": "green", "no band": "dim"}
Bands = Mapping[str, tuple[float, float]]


class TerminalSink:
    """Writes one line per reading: step, features with shift and place in the base band, explained variance, loss.

    Alarms and faults are red. Colours only where the stream is a terminal; progress bars of tqdm stay whole.

    Args:
        file: a text stream; None is standard error, where the bars are too.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self.console = Console(file=file, stderr=file is None, highlight=False)
        self._bands: Bands = {}

    def emit(self, event: Event) -> None:
        """Write the event's line."""
        from tqdm import tqdm

        if isinstance(event, Start):
            self._bands = event.bands
        with tqdm.external_write_mode(file=self.console.file):
            self.console.print(event_line(event, self._bands), soft_wrap=True)

    def close(self) -> None:
        """Nothing to close: the stream is not ours."""


def event_line(event: Event, bands: Bands) -> Text:
    """An event in one line of rich text; names are shown as they are, control characters as `?`."""
    if isinstance(event, Reading):
        return _reading(event, bands)
    if isinstance(event, Alarm):
        return Text(f"step {event.step}  ALARM {shown(event.rule)}: {shown(event.message)}", style="bold red")
    if isinstance(event, Fault):
        return Text(f"step {event.step}  {shown(event.part)} is off: {shown(event.message)}", style="red")
    if isinstance(event, Behaviour):
        return Text(f"step {event.step}  {shown(event.name)} {event.value:.4g}{_interval(event)}")
    if isinstance(event, End):
        return Text(f"step {event.step}  done: {event.readings} readings in {event.seconds:.1f} s", style="dim")
    names = ", ".join(shown(name) for name in event.features)
    return Text(f"watching {names} at layer {event.layer}, {event.n_probes} probes", style="dim")


def band_state(feature: FeatureValue, bands: Bands) -> str:
    """Where a feature's mean lies: `inside`, `above` or `below` its base band, or `no band`."""
    low, high = bands.get(feature.name, (nan, nan))
    if isnan(low) or isnan(high) or isnan(feature.mean):
        return "no band"
    return "below" if feature.mean < low else "above" if feature.mean > high else "inside"


def shown(text: str) -> str:
    """Untrusted text on one line: no control character may move the cursor or change the colour."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _reading(reading: Reading, bands: Bands) -> Text:
    line = Text(f"step {reading.step}" + ("" if reading.mode == "probe" else f" ({shown(reading.mode)})"))
    for feature in reading.features:
        state = band_state(feature, bands)
        line.append(f"  {shown(feature.name)} {feature.mean:.4g} ({feature.shift:+.2f} sd, ")
        line.append(state, STATES[state]).append(")")
    if not isnan(reading.explained_variance):
        line.append(f"  EV {reading.explained_variance:.3f}")
    if reading.loss is not None:
        line.append(f"  loss {reading.loss:.4g}")
    return line.append(f"  {reading.seconds:.2f} s", "dim")


def _interval(behaviour: Behaviour) -> str:
    if behaviour.ci_low is None or behaviour.ci_high is None:
        return ""
    return f" [{behaviour.ci_low:.4g}, {behaviour.ci_high:.4g}]"
