"""The hub between a monitor and its rules, actions and sinks: a part that raises is switched off, training goes on."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from persona_probe.errors import InputError, unknown
from persona_probe.monitor.events import NOT_FINITE, Alarm, Behaviour, Event, Fault, Reading, Start
from persona_probe.monitor.history import History
from persona_probe.monitor.reading import same_randomness

if TYPE_CHECKING:
    from persona_probe.monitor.actions.action import Action, ActionContext
    from persona_probe.monitor.rules.rule import Rule
    from persona_probe.monitor.sinks.sink import Sink

log = logging.getLogger(__name__)

T = TypeVar("T")
ON_ERROR = ("off", "raise")
NOT_CALIBRATED = (
    "rule %r uses the default band, which is not calibrated: how often it rings on benign training is not known. "
    "`persona-probe monitor calibrate CONFIG --rate 0.05` measures on benign runs what OutsideBand(band_sd=) should be"
)


class EventHub:
    """Passes events to sinks, what was read to rules and alarms to actions, and contains the errors of each part.

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
        self.history = History()
        """What was emitted so far, whatever sinks there are."""
        self.recording = True
        self._off: set[str] = set()
        self._diverged: set[str] = set()
        """Modes whose latest reading was not finite."""
        self._said = False

    def begin(self, recording: bool) -> None:
        """A run starts: every part is on again.

        Args:
            recording: whether this process records and judges (the first of a distributed run).
        """
        self.recording = recording
        self.faults, self.alarms, self._off, self._diverged = [], [], set(), set()

    def is_on(self, part: str) -> bool:
        """Whether a part has not failed yet."""
        return part not in self._off

    def switch_off(self, part: str) -> None:
        """Switch a part off silently, because it failed in another process."""
        self._off.add(part)

    def attempt(
        self, part: str, step: int, call: Callable[[], T], always: tuple[type[Exception], ...] = ()
    ) -> T | None:
        """Call a part that is on; None where it is off or fails now. Errors in `always` are raised all the same.

        Random states, gradient mode and the default dtype are afterwards as before, whatever the part did.
        """
        if not self.is_on(part):
            return None
        try:
            with same_randomness():
                return call()
        except Exception as error:
            if self.on_error == "raise" or isinstance(error, always):
                raise
            self.fail(part, step, error)
            return None

    def fail(self, part: str, step: int, error: Exception, tell: bool = True) -> None:
        """Switch a part off: record a fault, warn once, and tell the sinks that still work.

        Args:
            tell: False where the sinks are closed already.
        """
        fault = Fault(step, part, _in_words(error))
        self._off.add(part)
        self.faults.append(fault)
        trace = None if isinstance(error, InputError) else error
        with suppress(Exception):  # a handler of the user's may raise, and an error may have no text
            log.warning("%s is off from step %d, training goes on: %s", part, step, fault.message, exc_info=trace)
        if tell:
            self.emit(fault)

    def emit(self, event: Event) -> None:
        """Pass an event to every sink that works."""
        if self.recording:
            self.history.add([event])
        for part, sink in _named("sink", self.sinks if self.recording else ()):
            self.attempt(part, _step(event), lambda sink=sink: sink.emit(event))

    def flush(self, step: int) -> None:
        """Tell the sinks that want to know it that all events of a step were sent."""
        for part, sink in _named("sink", self.sinks if self.recording else ()):
            flush = getattr(sink, "flush", None)
            if callable(flush):
                self.attempt(part, step, flush)

    def announce(self, start: Start) -> None:
        """Tell rules and sinks that readings will come.

        Raises:
            InputError: a rule names a feature that is not read.
        """
        for part, rule in _named("rule", self.rules if self.recording else ()):
            self.attempt(part, 0, lambda rule=rule: rule.begin(start), always=(InputError,))
            if not self._said and self.attempt(part, 0, lambda rule=rule: bool(rule.uncalibrated)):
                self._said = True
                log.warning(NOT_CALIBRATED, rule.title)
        self.emit(start)

    def judge(self, step: int, readings: Sequence[Reading], measured: Mapping[str, Behaviour]) -> list[Alarm]:
        """The alarms that the readings and measurements of a step raise; the sinks get them too.

        The first reading of a mode that is not finite is an alarm by itself, whatever the rules are.
        """
        alarms = [alarm for reading in readings if (alarm := self._not_finite(reading)) is not None]
        for part, rule in _named("rule", self.rules if self.recording else ()):
            alarms += self.attempt(part, step, lambda rule=rule: _checked(rule.take(step, readings, measured))) or []
        for alarm in alarms:
            self.emit(alarm)
        return alarms

    def _not_finite(self, reading: Reading) -> Alarm | None:
        before = reading.mode in self._diverged
        if reading.finite:
            self._diverged.discard(reading.mode)
            return None
        self._diverged.add(reading.mode)
        if before or not self.recording:
            return None
        bad = next((value for value in reading.features if not math.isfinite(value.mean)), None)
        what = "activations that are read are" if bad is None else f"{bad.name!r} reads {bad.mean}: it is"
        where = "" if reading.mode == "probe" else f" in {reading.mode} readings"
        message = f"{what} not finite{where}; the model has diverged, or an SAE or a direction is damaged"
        name = bad.name if bad else ""
        return Alarm(reading.step, NOT_FINITE, name, message, math.nan if bad is None else bad.mean, math.nan)

    def all_inside(self, step: int) -> bool:
        """Whether the latest readings were finite, and every rule says that they were inside.

        A rule that failed cannot say so: from then on no state of the model is known to be clean.
        """
        said = [
            self.attempt(part, step, lambda rule=rule: bool(rule.inside)) for part, rule in _named("rule", self.rules)
        ]
        return not self._diverged and all(said)

    def act(self, alarms: Sequence[Alarm], clean: bool, make_context: "Callable[[], ActionContext]") -> None:
        """Let the actions act on alarms, or note a clean model.

        In the other processes of a distributed run only the actions that change training act.
        """
        self.alarms += alarms
        if not self.actions or not (alarms or clean):
            return
        context = make_context()
        for part, action in _named("action", self.actions):
            everywhere = self.attempt(part, context.step, lambda action=action: bool(action.every_rank))
            if not (self.recording or everywhere):
                continue
            for alarm in alarms:
                self.attempt(part, context.step, lambda action=action, alarm=alarm: action.act(alarm, context))
            if clean and not alarms:
                self.attempt(part, context.step, lambda action=action: action.clean(context))

    def close(self, step: int) -> None:
        """Close the sinks: all of them, also where one cannot be closed."""
        failed: list[tuple[str, Exception]] = []
        for part, sink in _named("sink", self.sinks):
            try:
                with same_randomness():
                    sink.close()
            except Exception as error:
                failed.append((part, error))
        for part, error in failed:
            if self.on_error == "raise":
                raise error
            if self.is_on(part):
                self.fail(part, step, error, tell=False)


def _in_words(error: Exception) -> str:
    """The first line of an error, with its kind; an error may fail to say what it is."""
    try:
        first = next(iter(str(error).splitlines()), "")
    except Exception:
        first = ""
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _checked(answers: Sequence[object]) -> list[Alarm]:
    """What a rule answered, if these are answers."""
    for answer in answers:
        if not isinstance(answer, Alarm):
            raise TypeError(f"a rule answers with an Alarm or None, not {type(answer).__name__}")
    return [answer for answer in answers if isinstance(answer, Alarm)]


def _named(kind: str, parts: Iterable[T]) -> list[tuple[str, T]]:
    """Parts with the names that faults give them; the number tells two of a kind apart."""
    return [(f"{kind} {number} ({type(part).__name__})", part) for number, part in enumerate(parts, 1)]


def _step(event: Event) -> int:
    return 0 if isinstance(event, Start) else event.step
