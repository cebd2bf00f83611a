"""One line per reading in the terminal."""

from math import isnan
from typing import TextIO

from rich.console import Console
from rich.text import Text

from persona_probe.monitor.band import Bands, band_state
from persona_probe.monitor.events import Alarm, Behaviour, End, Event, Fault, Reading, Start

STATES = {"above": "bold yellow", "below": "bold yellow", "inside": "green", "no band": "dim", "not finite": "bold red"}


class TerminalSink:
    """Writes one line per reading: step, features with shift and place in the base band, explained variance, loss.

    Alarms and faults are red. Colours appear in a terminal only; progress bars of tqdm stay intact.

    Args:
        file: a text stream; None is standard error, like the bars.
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
        """Nothing to close: the stream belongs to the caller."""


def event_line(event: Event, bands: Bands) -> Text:
    """An event in one line of rich text; names are shown as they are, control characters as `?`."""
    if isinstance(event, Reading):
        return _reading(event, bands)
    if isinstance(event, Alarm):
        return Text(f"step {event.step}  ALARM {printable(event.rule)}: {printable(event.message)}", style="bold red")
    if isinstance(event, Fault):
        return Text(f"step {event.step}  {printable(event.part)} is off: {printable(event.message)}", style="red")
    if isinstance(event, Behaviour):
        return Text(f"step {event.step}  {printable(event.name)} {event.value:.4g}{_interval(event)}")
    if isinstance(event, End):
        return Text(f"step {event.step}  done: {event.readings} readings in {event.seconds:.1f} s", style="dim")
    names = ", ".join(printable(name) for name in event.features)
    return Text(f"watching {names} at layer {event.layer}, {event.n_probes} probes", style="dim")


def printable(text: str) -> str:
    """Untrusted text on one line, control characters replaced: none may move the cursor or change the colour."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _reading(reading: Reading, bands: Bands) -> Text:
    line = Text(f"step {reading.step}" + ("" if reading.mode == "probe" else f" ({printable(reading.mode)})"))
    for feature in reading.features:
        state = band_state(feature, bands)
        line.append(f"  {printable(feature.name)} {feature.mean:.4g} ({feature.shift:+.2f} sd, ")
        line.append(state, STATES[state]).append(")")
    if not isnan(reading.explained_variance):
        line.append(f"  EV {reading.explained_variance:.3f}")
    if reading.loss is not None:
        line.append(f"  loss {reading.loss:.4g}")
    return line.append(f"  {reading.seconds:.2f} s", "dim")


def _interval(behaviour: Behaviour) -> str:
    if behaviour.ci_low is None or behaviour.ci_high is None or isnan(behaviour.ci_low):
        return ""
    return f" [{behaviour.ci_low:.4g}, {behaviour.ci_high:.4g}]"
