"""What to do at an alarm in an answer: log, note it, stop, draw again, steer the feature down, call a function."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from persona_probe.errors import InputError, unknown
from persona_probe.monitor.generation.rules import AnswerRule, RuleState
from persona_probe.monitor.generation.trace import AnswerAlarm
from persona_probe.untrusted import one_line

log = logging.getLogger(__name__)


@dataclass
class AnswerUnderWay:
    """An answer while it is written, as actions see it."""

    number: int
    """Which of the answers it is."""
    states: list[RuleState]
    attempt: int = 0
    """How often it was drawn before."""
    values: list[Float[np.ndarray, " features"]] = field(default_factory=list)
    """The features of each token that has been run."""
    prompt: Float[np.ndarray, " features"] | None = None
    alarms: list[AnswerAlarm] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopped: bool = False
    """It ends at this token."""
    rejected: bool = False
    """It is thrown away, and drawn again."""
    push: dict[str, float] = field(default_factory=dict)
    """Feature to how much of it is added at every further token, in its units; below zero it is steered down."""
    steered_from: int | None = None
    """The first token that was written under a push."""
    instead: str | None = None
    """What is given in place of its text."""


@dataclass(frozen=True)
class AnswerAction(ABC):
    """Something to do at an alarm in an answer."""

    only_for: Collection[str] | None = field(default=None, kw_only=True)
    """Names of the rules whose alarms it acts on; None acts on all."""

    def act(self, alarm: AnswerAlarm, answer: AnswerUnderWay) -> str | None:
        """Act, if the alarm's rule is among `only_for`; returns what was done in a few words."""
        return self._do(alarm, answer) if self.only_for is None or alarm.rule in self.only_for else None

    @abstractmethod
    def _do(self, alarm: AnswerAlarm, answer: AnswerUnderWay) -> str: ...


@dataclass(frozen=True)
class LogAnswer(AnswerAction):
    """Log the alarm as a warning, without any of the answer's text."""

    def _do(self, alarm: AnswerAlarm, answer: AnswerUnderWay) -> str:
        log.warning("answer %d: %s", answer.number, one_line(str(alarm)))
        return "logged"


@dataclass(frozen=True)
class Annotate(AnswerAction):
    """Give the answer a note; the answer goes on."""

    note: str = "{rule} was beyond its threshold at token {token}"
    """May name `{rule}`, `{feature}`, `{token}`, `{value}` and `{threshold}`."""

    def _do(self, alarm: AnswerAlarm, answer: AnswerUnderWay) -> str:
        try:
            note = self.note.format(**{key: getattr(alarm, key) for key in NOTED})
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(f"Annotate: the note {self.note!r} may name {', '.join(NOTED)} only ({error})") from error
        answer.notes.append(note)
        return "annotated"


NOTED = ("rule", "feature", "token", "value", "threshold")


@dataclass(frozen=True)
class StopAnswer(AnswerAction):
    """End the answer before another token is chosen."""

    instead: str | None = None
    """Given in place of the answer's text; None keeps what was written."""

    def _do(self, alarm: AnswerAlarm, answer: AnswerUnderWay) -> str:
        answer.stopped, answer.instead = True, self.instead
        return "stopped"


@dataclass(frozen=True)
class Regenerate(AnswerAction):
    """Throw the answer away and draw it again, with other random numbers; the last attempt ends at its alarm.

    Raises:
        InputError: fewer than one try.
    """

    tries: int = 2
    """Attempts after the first."""
    instead: str | None = None
    """Given in place of an answer whose every attempt alarmed; None keeps what the last one wrote up to its alarm."""

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise InputError(f"tries of Regenerate must be at least 1, not {self.tries}")

    def _do(self, alarm: AnswerAlarm, answer: AnswerUnderWay) -> str:
        answer.stopped = True
        if answer.attempt < self.tries:
            answer.rejected = True
            return f"drawn again ({answer.attempt + 1} of {self.tries})"
        answer.instead = self.instead
        return f"stopped after {self.tries + 1} attempts"


@dataclass(frozen=True)
class SteerDown(AnswerAction):
    """From the next token on, take out of the residual stream what the feature added to it at the alarm.

    The push is -`times` x the alarm's value x the latent's decoder row, or the unit direction. Readings are taken
    before it.
    """

    times: float = 1.0

    def _do(self, alarm: AnswerAlarm, answer: AnswerUnderWay) -> str:
        answer.push[alarm.feature] = answer.push.get(alarm.feature, 0.0) - self.times * alarm.value
        if answer.steered_from is None:
            answer.steered_from = alarm.token + 1
        return f"steered down by {self.times * alarm.value:.4g}"


@dataclass(frozen=True)
class CallWith(AnswerAction):
    """Call a function with the alarm and the answer under way, whose `stopped`, `notes` and `push` it may set.

    What the function raises ends the generation.
    """

    function: Callable[[AnswerAlarm, AnswerUnderWay], object]

    def _do(self, alarm: AnswerAlarm, answer: AnswerUnderWay) -> str:
        self.function(alarm, answer)
        return f"called {getattr(self.function, '__name__', 'a function')}"


def check_answer_actions(rules: Iterable[AnswerRule], actions: Sequence[AnswerAction]) -> None:
    """Refuse an action for a rule that the monitor does not have.

    Raises:
        InputError: `only_for` names no rule; near matches are listed.
    """
    known = [rule.title for rule in rules]
    for action in actions:
        if not isinstance(action, AnswerAction):
            raise InputError(f"{type(action).__name__} is no action on answers: take StopAnswer(), Annotate(), ...")
        for name in action.only_for or ():
            if name not in known:
                raise unknown(f"rule in only_for of {type(action).__name__}", name, known)
