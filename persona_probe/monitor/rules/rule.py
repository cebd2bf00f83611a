"""What an alarm rule is, what rules on a reading's numbers share, and rules of rules."""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from persona_probe.errors import InputError, unknown
from persona_probe.monitor.events import Alarm, Behaviour, FeatureValue, Reading, Start

log = logging.getLogger(__name__)


class Rule(ABC):
    """A rule that reads every `Reading` of a run and says when something is wrong.

    A monitor calls `begin` when it starts and `take` at every step that is read, which passes each reading to `update`.
    A rule fires once per excursion: it stays silent until a reading is back inside, then it is armed again.
    """

    @property
    @abstractmethod
    def title(self) -> str:
        """The rule's name, as its alarms give it and as `only_for` of an action takes it."""

    @property
    @abstractmethod
    def firing(self) -> bool:
        """Whether an excursion is on: the rule fired, and no reading has been back inside since."""

    @property
    @abstractmethod
    def inside(self) -> bool:
        """Whether the latest reading is far from an alarm: not firing, nor on the way there. True before any reading.

        A state of the model is clean when all rules are inside (`all_inside`). "No alarm" is not enough, since an
        excursion gives one alarm and then none.
        """

    @property
    def uncalibrated(self) -> bool:
        """Whether its limits are a default, of which no false-alarm rate is known; the monitor says so once."""
        return False

    @property
    def measurements(self) -> tuple[str, ...]:
        """Names of the monitor's measurements (`behaviour=`) that the rule asks about."""
        return ()

    @abstractmethod
    def begin(self, start: Start) -> None:
        """A run starts: forget the previous one, and take the bands of this one.

        Raises:
            InputError: the rule names a feature that the run does not read.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget all readings; the bands of `begin` stay."""

    @abstractmethod
    def update(self, reading: Reading) -> Alarm | None:
        """Take one reading; return an alarm if it starts an excursion.

        A feature that is not finite is outside, whatever the rule's limits are (`Reading.finite`): the model diverged.
        Other numbers that are missing (NaN) are ignored with a warning.

        Raises:
            InputError: the rule names a feature that the reading does not hold.
        """

    def take(self, step: int, readings: Sequence[Reading], measured: Mapping[str, Behaviour]) -> list[Alarm]:
        """Take all that was read at one step; return the alarms of excursions that it starts.

        Args:
            readings: at most one of each mode.
            measured: the measurements that were made at this step, by their names in `behaviour=`.

        Raises:
            InputError: as `update`.
        """
        answers = [self.update(reading) for reading in readings]
        return [alarm for alarm in answers if alarm is not None]

    @abstractmethod
    def describe(self) -> str:
        """The rule in one line, with its numbers."""


def check_measurements(rules: Iterable[Rule], known: Collection[str]) -> None:
    """Refuse a rule that asks about a measurement which the monitor does not make.

    Raises:
        InputError: near matches are listed.
    """
    for rule in rules:
        for name in rule.measurements:
            if not known:
                what = f"rule {rule.title!r} asks about the measurement {name!r}"
                raise InputError(f"{what}, but the monitor makes none: pass behaviour={{{name!r}: ...}}")
            if name not in known:
                raise unknown(f"measurement in rule {rule.title!r}", name, known)


def all_inside(rules: Iterable[Rule]) -> bool:
    """Whether every rule finds the present state of the model clean, so that `Action.clean` may be called."""
    return all(rule.inside for rule in rules)


# --- Rules on a reading's numbers: they fire once per excursion, and are armed again when a reading is back inside

MODES = ("probe", "passive")


@dataclass(frozen=True)
class Comparison:
    """One reading of one subject (a feature, or the SAE's fit) against the limit of a rule."""

    value: float
    threshold: float
    over: bool
    """Beyond the limit."""
    inside: bool
    """Far enough back that an excursion is over."""
    text: str
    """The two numbers in words."""


@dataclass
class SubjectState:
    """What a rule remembers of one subject in one mode."""

    step: int | None = None
    over: int = 0
    """Readings in a row beyond the limit."""
    firing: bool = False
    inside: bool = True

    def follow(self, step: int, comparison: Comparison, consecutive: int) -> bool:
        """Note a comparison; whether it starts an excursion, as the last of so many in a row beyond the limit."""
        self.step = step
        self.inside, self.over = comparison.inside, self.over + 1 if comparison.over else 0
        if self.firing:
            self.firing = not comparison.inside
            return False
        self.firing = self.over >= consecutive
        return self.firing


@dataclass
class Memory:
    """What a rule remembers of a run."""

    states: dict[tuple[str, str], SubjectState] = field(default_factory=dict)
    """By subject and mode: probe and passive readings are two series."""
    warned: set[str] = field(default_factory=set)
    bands: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class ReadingRule(Rule):
    """A rule on numbers of a reading."""

    mode: str | None = None
    """Readings that the rule looks at: `probe`, `passive`, or None for both (each is followed separately)."""
    name: str | None = None
    """Its name in alarms; None takes the kind's name."""
    _memory: Memory = field(default_factory=Memory, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)

    @property
    @abstractmethod
    def kind(self) -> str:
        """The name of this kind of rule."""

    @property
    def title(self) -> str:
        """The rule's own name, or that of its kind."""
        return self.kind if self.name is None else self.name

    @property
    def consecutive(self) -> int:
        """Readings in a row that make an alarm."""
        return 1

    @property
    def firing(self) -> bool:
        """Whether an excursion of any subject is on."""
        return any(state.firing for state in self._memory.states.values())

    @property
    def inside(self) -> bool:
        """Whether every subject was inside at its latest reading."""
        return all(state.inside for state in self._memory.states.values())

    def begin(self, start: Start) -> None:
        """Forget the previous run, and take the bands of this one."""
        self.reset()
        self._memory.bands = dict(start.bands)

    def reset(self) -> None:
        """Forget all readings; the bands stay."""
        self._memory.states.clear()
        self._memory.warned.clear()

    def update(self, reading: Reading) -> Alarm | None:
        """Take one reading; return an alarm if excursions start, with all of them in its message."""
        if self.mode is not None and reading.mode != self.mode:
            return None
        fired = [(subject, self._follow(subject, reading)) for subject in self._subjects(reading)]
        return self._alarm(reading, [(subject, comparison) for subject, comparison in fired if comparison is not None])

    @abstractmethod
    def _subjects(self, reading: Reading) -> Sequence[str]:
        """The subjects that the rule follows, each separately."""

    @abstractmethod
    def _compare(self, state: SubjectState, subject: str, reading: Reading) -> Comparison | None:
        """The reading of a subject against the limit; None where a number that is needed is NaN."""

    def _new_state(self) -> SubjectState:
        return SubjectState()

    def _follow(self, subject: str, reading: Reading) -> Comparison | None:
        """The comparison, if it starts an excursion."""
        state = self._memory.states.setdefault((subject, reading.mode), self._new_state())
        if state.step is not None and reading.step <= state.step:
            self._warn(f"a reading at step {reading.step} came after one at step {state.step}: ignored", "order")
            return None
        comparison = self._compare(state, subject, reading)
        starts = comparison is not None and state.follow(reading.step, comparison, self.consecutive)
        return comparison if starts else None

    def _alarm(self, reading: Reading, fired: list[tuple[str, Comparison]]) -> Alarm | None:
        if not fired:
            return None
        subject, first = fired[0]
        message = "; ".join(f"{name!r} {comparison.text}" for name, comparison in fired)
        return Alarm(reading.step, self.title, subject, message, first.value, first.threshold)

    def _warn(self, message: str, key: str | None = None) -> None:
        """Warn of each thing once per run; messages of one key count as one thing."""
        if (key or message) not in self._memory.warned:
            self._memory.warned.add(key or message)
            log.warning("rule %r: %s", self.title, message)


def not_finite(value: float) -> Comparison:
    """What every rule makes of a value that is not finite: beyond its limit, and not inside."""
    return Comparison(value, math.nan, over=True, inside=False, text=f"is not finite ({value}): the model has diverged")


def in_a_row(count: int) -> str:
    """`at one reading`, or `at 3 readings in a row`."""
    return "at one reading" if count == 1 else f"at {count} readings in a row"


def check_count(name: str, count: int) -> None:
    """Refuse a count of readings below one."""
    if count < 1:
        raise InputError(f"{name} must be at least 1 reading, not {count}")


def check_known(feature: str | None, known: Collection[str]) -> None:
    """Refuse a feature that is not read."""
    if feature is not None and feature not in known:
        raise unknown("feature", feature, known)


# --- Rules on the features of a reading, each feature followed separately

SIDES = ("both", "up", "down")


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureRule(ReadingRule):
    """A rule on one feature, or on every feature of a reading."""

    feature: str | None = None
    """The feature that is followed; None follows all. The rule fires for each, and is back inside when all are."""

    def begin(self, start: Start) -> None:
        """A run starts; the feature must be among those that it reads."""
        check_known(self.feature, start.features)
        super().begin(start)

    def _subjects(self, reading: Reading) -> Sequence[str]:
        names = [value.name for value in reading.features]
        check_known(self.feature, names)
        return names if self.feature is None else [self.feature]

    def _compare(self, state: SubjectState, subject: str, reading: Reading) -> Comparison | None:
        value = next(v for v in reading.features if v.name == subject)
        if not math.isfinite(value.mean):
            return not_finite(value.mean)
        comparison = self._compare_feature(state, value, reading)
        if comparison is None:
            self._warn(f"{subject!r} is ignored where {self._missing(value)}")
        return comparison

    @abstractmethod
    def _compare_feature(self, state: SubjectState, value: FeatureValue, reading: Reading) -> Comparison | None:
        """The reading of this feature against the limit; None where a number that is needed is NaN."""

    def _missing(self, value: FeatureValue) -> str:
        """The reason why there was no comparison."""
        if value.base_sd == 0 and not math.isnan(value.mean):
            return "its base model's probes do not differ, so that it has no shift in base sd; use OutsideBand"
        return "a number that it needs is NaN"

    def _whom(self) -> str:
        modes = "" if self.mode is None else f", {self.mode} readings"
        return ("any feature" if self.feature is None else repr(self.feature)) + modes


@dataclass(frozen=True, eq=False, kw_only=True)
class SidedRule(FeatureRule):
    """A rule that can look at rises only, or at falls only."""

    side: str = "both"
    """`both`, `up` (rises only) or `down`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in SIDES:
            raise unknown("side", self.side, SIDES)

    def _sided(self) -> str:
        return {"both": "", "up": ", upward", "down": ", downward"}[self.side]


def shifted(value: FeatureValue) -> str:
    """A feature's shift, as a clause for an alarm."""
    return "" if math.isnan(value.shift) else f" (shift {value.shift:+.2f} base sd)"


def positive(name: str, value: float, zero: bool = False) -> None:
    """Refuse a number that is not finite and above zero (or zero, where that is allowed)."""
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise InputError(f"{name} must be {'zero or more' if zero else 'above zero'}, not {value}")


# --- Rules of rules


class Composite(Rule):
    """Follows its parts, and fires when their excursions together meet its condition.

    It looks once a step, after all parts have taken what was read there: features in every mode, and measurements.

    Do not pass the parts to the monitor as well: each of them would count every reading twice.
    """

    kind = "composite"

    def __init__(self, *rules: Rule, name: str | None = None) -> None:
        if not rules:
            raise InputError(f"{type(self).__name__} needs at least one rule")
        self.rules, self.name = rules, name
        self._alarms: dict[int, Alarm] = {}
        self._firing = False

    @property
    def title(self) -> str:
        """The rule's own name, or that of its kind."""
        return self.kind if self.name is None else self.name

    @property
    def firing(self) -> bool:
        """Whether its excursion is on."""
        return self._holds(rule.firing for rule in self.rules)

    @property
    def uncalibrated(self) -> bool:
        """Whether a part is."""
        return any(rule.uncalibrated for rule in self.rules)

    @property
    def measurements(self) -> tuple[str, ...]:
        """Names of the measurements that the parts ask about."""
        return tuple(name for rule in self.rules for name in rule.measurements)

    def _holds(self, parts: Iterable[bool]) -> bool:
        raise NotImplementedError

    def begin(self, start: Start) -> None:
        """A run starts: every part begins."""
        for rule in self.rules:
            rule.begin(start)
        self._forget()

    def reset(self) -> None:
        """Forget all readings, in every part."""
        for rule in self.rules:
            rule.reset()
        self._forget()

    def _forget(self) -> None:
        self._alarms, self._firing = {}, False

    def update(self, reading: Reading) -> Alarm | None:
        """Pass the reading to every part; return an alarm if the condition begins to hold."""
        return next(iter(self.take(reading.step, [reading], {})), None)

    def take(self, step: int, readings: Sequence[Reading], measured: Mapping[str, Behaviour]) -> list[Alarm]:
        """Pass all of a step to every part; return an alarm if the condition begins to hold."""
        for i, rule in enumerate(self.rules):
            for alarm in rule.take(step, readings, measured):
                self._alarms[i] = alarm
        before, self._firing = self._firing, self.firing
        return [self._alarm(step)] if self._firing and not before else []

    def _alarm(self, step: int) -> Alarm:
        """An alarm with the newest numbers, and the messages of all parts that are in an excursion."""
        parts = [self._alarms[i] for i, rule in enumerate(self.rules) if rule.firing and i in self._alarms]
        numbered = [alarm for alarm in parts if alarm.feature]  # `Not` has none
        if not numbered:
            return Alarm(step, self.title, "", f"no excursion of {self._parts()}", math.nan, math.nan)
        newest = max(numbered, key=lambda alarm: alarm.step)
        message = " and ".join(f"{a.rule} (step {a.step}): {a.message}" for a in parts)
        features = ", ".join(dict.fromkeys(alarm.feature for alarm in numbered))
        return replace(newest, step=step, rule=self.title, feature=features, message=message)

    def describe(self) -> str:
        """The rule and its parts in one line."""
        return f"{self.title} ({self._parts()})"

    def _parts(self) -> str:
        return "; ".join(rule.describe() for rule in self.rules)


class AllOf(Composite):
    """Fires when all parts are in an excursion at once: `AllOf(OutsideBand(), Not(ExplainedVarianceFloor()))`."""

    kind = "all of"

    def _holds(self, parts: Iterable[bool]) -> bool:
        return all(parts)

    @property
    def inside(self) -> bool:
        """Whether a part is inside: then not all can be in an excursion."""
        return any(rule.inside for rule in self.rules)


class AnyOf(Composite):
    """Fires when a part is in an excursion: once, until no part is."""

    kind = "any of"

    def _holds(self, parts: Iterable[bool]) -> bool:
        return any(parts)

    @property
    def inside(self) -> bool:
        """Whether all parts are inside."""
        return all(rule.inside for rule in self.rules)


class Not(Composite):
    """Holds while its rule is in no excursion; a part of `AllOf`. A rule that saw no usable reading is in none."""

    kind = "not"

    def __init__(self, rule: Rule, *, name: str | None = None) -> None:
        super().__init__(rule, name=name)

    def _holds(self, parts: Iterable[bool]) -> bool:
        return not any(parts)

    @property
    def inside(self) -> bool:
        """Whether its rule is in an excursion."""
        return not self.firing
