"""The hub between a monitor and its rules, actions and sinks: a part that raises is switched off, training goes on."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from persona_probe.errors import InputError, unknown
from persona_probe.monitor.events import Alarm, Event, Fault, Reading, Start

if TYPE_CHECKING:
    from persona_probe.monitor.actions.action import Action, ActionContext
    from persona_probe.monitor.rules.rule import Rule
    from persona_probe.monitor.sinks.sink import Sink

log = logging.getLogger(__name__)

T = TypeVar("T")
ON_ERROR = ("off", "raise")


class EventHub:
    """Passes events to sinks, readings to rules and alarms to actions, and contains the errors of each part.

    Args:
        on_error: `off` (record a `Fault`, warn once, continue without that part) or `raise`.

    Raises:
        InputError: unknown `on_error`, or an action for a rule that the monitor does not have.
    """

    def __init__(
        self, rules: "Sequence[Rule]", actions: "Sequence[Action]", sinks: "Sequence[Sink]", on_error: str
    ) -> None:
        if on_error not in ON_ERROR:
            raise unknown("on_error", on_error, ON_ERROR)
        if actions:
            from persona_probe.monitor.actions.action import check_actions

            check_actions(rules, actions)
        self.rules, self.actions, self.sinks, self.on_error = tuple(rules), tuple(actions), list(sinks), on_error
        self.faults: list[Fault] = []
        self.alarms: list[Alarm] = []
        self.recording = True
        self._off: set[str] = set()

    def begin(self, recording: bool) -> None:
        """A run starts: every part is on again.

        Args:
            recording: whether this process records and judges (the first of a distributed run).
        """
        self.recording = recording
        self.faults, self.alarms, self._off = [], [], set()

    def is_on(self, part: str) -> bool:
        """Whether a part has not failed yet."""
        return part not in self._off

    def switch_off(self, part: str) -> None:
        """Switch a part off silently, because it failed in another process."""
        self._off.add(part)

    def attempt(
        self, part: str, step: int, call: Callable[[], T], always: tuple[type[Exception], ...] = ()
    ) -> T | None:
        """Call a part that is on; None where it is off or fails now. Errors in `always` are raised all the same."""
        if not self.is_on(part):
            return None
        try:
            return call()
        except Exception as error:
            if self.on_error == "raise" or isinstance(error, always):
                raise
            self.fail(part, step, error)
            return None

    def fail(self, part: str, step: int, error: Exception) -> None:
        """Switch a part off: record a fault, warn once, and tell the sinks that still work."""
        first = next(iter(str(error).splitlines()), "")
        fault = Fault(step, part, f"{type(error).__name__}: {first}" if first else type(error).__name__)
        self._off.add(part)
        self.faults.append(fault)
        trace = None if isinstance(error, InputError) else error
        log.warning("%s is off from step %d, training goes on: %s", part, step, fault.message, exc_info=trace)
        self.emit(fault)

    def emit(self, event: Event) -> None:
        """Pass an event to every sink that works."""
        for part, sink in _named("sink", self.sinks if self.recording else ()):
            self.attempt(part, _step(event), lambda sink=sink: sink.emit(event))

    def announce(self, start: Start) -> None:
        """Tell rules and sinks that readings will come.

        Raises:
            InputError: a rule names a feature that is not read.
        """
        for part, rule in _named("rule", self.rules if self.recording else ()):
            self.attempt(part, 0, lambda rule=rule: rule.begin(start), always=(InputError,))
        self.emit(start)

    def judge(self, reading: Reading) -> list[Alarm]:
        """The alarms that a reading raises; the sinks get them too."""
        answers = [
            self.attempt(part, reading.step, lambda rule=rule: rule.update(reading))
            for part, rule in _named("rule", self.rules if self.recording else ())
        ]
        alarms = [alarm for alarm in answers if alarm is not None]
        for alarm in alarms:
            self.emit(alarm)
        return alarms

    def all_inside(self) -> bool:
        """Whether every rule that works found the latest readings inside."""
        return all(rule.inside for part, rule in _named("rule", self.rules) if self.is_on(part))

    def act(self, alarms: Sequence[Alarm], clean: bool, make_context: "Callable[[], ActionContext]") -> None:
        """Let the actions act on alarms, or note a clean model.

        In the other processes of a distributed run only the actions that change training act.
        """
        self.alarms += alarms
        if not self.actions or not (alarms or clean):
            return
        context = make_context()
        for part, action in _named("action", self.actions):
            if not (self.recording or action.every_rank):
                continue
            for alarm in alarms:
                self.attempt(part, context.step, lambda action=action, alarm=alarm: action.act(alarm, context))
            if clean and not alarms:
                self.attempt(part, context.step, lambda action=action: action.clean(context))

    def close(self, step: int) -> None:
        """Close the sinks."""
        for part, sink in _named("sink", self.sinks):
            self.attempt(part, step, sink.close)


def _named(kind: str, parts: Iterable[T]) -> list[tuple[str, T]]:
    """Parts with the names that faults give them; the number tells two of a kind apart."""
    return [(f"{kind} {number} ({type(part).__name__})", part) for number, part in enumerate(parts, 1)]


def _step(event: Event) -> int:
    return 0 if isinstance(event, Start) else event.step
