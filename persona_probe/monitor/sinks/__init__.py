"""Where a monitor's events go: a file, the trainer's loggers, the terminal, Prometheus, a live figure."""

from typing import Protocol

from persona_probe.monitor.events import Event
from persona_probe.monitor.sinks.files import JsonlSink, TerminalSink, TrainerLogSink, read_events, readings_frame
from persona_probe.monitor.sinks.live import LiveView
from persona_probe.monitor.sinks.prometheus import PrometheusSink


class Sink(Protocol):
    """Takes a monitor's events, in order. What it raises is caught by the monitor, which then switches it off."""

    def emit(self, event: Event) -> None:
        """Take one event."""
        ...

    def close(self) -> None:
        """Let go of files, ports and threads; an `emit` afterwards opens them again where that makes sense."""
        ...


__all__ = [
    "JsonlSink",
    "LiveView",
    "PrometheusSink",
    "Sink",
    "TerminalSink",
    "TrainerLogSink",
    "read_events",
    "readings_frame",
]
