"""What a sink is: it takes a monitor's events."""

from typing import Protocol

from persona_probe.monitor.events import Event


class Sink(Protocol):
    """Takes a monitor's events, in order. The monitor catches what it raises and switches it off.

    A sink that has a method `flush()` is also told when all events of a step were sent.
    """

    def emit(self, event: Event) -> None:
        """Take one event."""
        ...

    def close(self) -> None:
        """Let go of files, ports and threads; an `emit` afterwards opens them again where that makes sense."""
        ...
