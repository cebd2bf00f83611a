"""Answers under way, one forward pass after another: what is read, which rules fire, what the actions do."""

from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from persona_probe.monitor.generation.actions import AnswerAction, AnswerUnderWay, LogAnswer
from persona_probe.monitor.generation.reader import TokenReader
from persona_probe.monitor.generation.trace import AnswerAlarm, Trace


@dataclass(frozen=True)
class WatchedAnswer:
    """An answer with what was read while it was written; a notebook shows its trace."""

    text: str
    """Without special tokens and thought, as `pp.generate` gives it; or what an action put in its place."""
    thought: str
    """What the model thought before it answered; empty where it wrote no thought."""
    trace: Trace
    """Of all tokens that it wrote, those of the thought included."""
    finish: str
    """`stop`: the model ended its turn; `length`: it was cut; `alarm`: an action ended it."""
    notes: tuple[str, ...] = ()
    steered_from: int | None = None
    """The first token that was written under a push of `SteerDown`."""
    rejected: tuple[Trace, ...] = ()
    """Attempts that were thrown away."""

    @property
    def alarms(self) -> tuple[AnswerAlarm, ...]:
        """Of this answer, not of attempts that were thrown away."""
        return self.trace.alarms

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.trace._repr_html_()


Seen = Callable[[AnswerUnderWay, int, int], None]
"""Called with an answer, the place of a token that has been run and read, and its id."""


class Follower:
    """Follows all answers under way: the observer of `evaluate.sampling.decoding`.

    Args:
        new_answer: makes an answer that begins, from its name.
        special: ids of tokens that rules pass over.
        names: what answers are called in the log; None takes their numbers.
        seen: called at every token once it is read and judged.
    """

    def __init__(
        self,
        reader: TokenReader,
        new_answer: Callable[[int], AnswerUnderWay],
        actions: Sequence[AnswerAction],
        special: Set[int],
        names: Sequence[int] | None = None,
        seen: Seen | None = None,
    ) -> None:
        self.reader, self.new_answer, self.actions, self.special = reader, new_answer, actions, special
        self.names, self.seen = names, seen
        self.answers: dict[int, AnswerUnderWay] = {}
        self._steers = any(not isinstance(action, LogAnswer) for action in actions)

    def before(self, numbers: Sequence[int | None]) -> None:
        """Put the pushes of the rows of the next pass on."""
        if self._steers:
            wanted = [None if n is None or n not in self.answers else self.answers[n].push for n in numbers]
            self.reader.push(wanted)

    def after(self, rows: Sequence[int], numbers: Sequence[int], made: Sequence[Sequence[int]]) -> Collection[int]:
        """Read the tokens that were run, let the rules judge them and the actions act; gives the answers that end."""
        values = self.reader.read(rows)
        over = set()
        for number, tokens, value in zip(numbers, made, values, strict=True):
            answer = self.answers.get(number)
            if answer is None:
                name = number if self.names is None else self.names[number]
                answer = self.answers[number] = self.new_answer(name)
            if not tokens:
                answer.prompt = value
            else:
                answer.values.append(value)
                if tokens[-1] not in self.special:
                    alarm(answer, len(tokens) - 1, value, self.actions)
                if self.seen is not None:
                    self.seen(answer, len(tokens) - 1, tokens[-1])
            if answer.stopped:
                over.add(number)
        return over

    def end(self, number: int) -> AnswerUnderWay:
        """The answer is over; rules that waited for more tokens judge it now."""
        answer = self.answers.pop(number)
        if not answer.stopped:
            end_of_answer(answer, max(0, len(answer.values) - 1), self.actions)
        return answer


def alarm(
    answer: AnswerUnderWay,
    token: int,
    values: Float[np.ndarray, " features"] | None,
    actions: Sequence[AnswerAction],
) -> None:
    """Let the rules judge a token (None: the end of the answer), and the actions act on what fires."""
    for state in answer.states:
        level = state.end() if values is None else state.update(values.tolist())
        if level is None:
            continue
        assert state.rule.threshold is not None
        found = AnswerAlarm(state.rule.title, state.rule.feature, token, level, state.rule.threshold)
        did = [action.act(found, answer) for action in actions]
        answer.alarms.append(replace(found, did=tuple(words for words in did if words)))


def end_of_answer(answer: AnswerUnderWay, token: int, actions: Sequence[AnswerAction]) -> None:
    """`alarm` when an answer is over."""
    alarm(answer, token, None, actions)
