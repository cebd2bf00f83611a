"""Answers under way, one forward pass after another: what is read, which rules fire, what the actions do."""

from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from persona_probe.models.places import Place
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
"""Called with an answer, the place of a token that has been run and judged, and its id."""
BLOCK = 16
"""Passes whose tokens are read together where latents compete (TopK) and no rule can fire at them: a whole dictionary
on one token costs as much as on several."""
Activations = dict[Place, Float[Tensor, "tokens width"]]


class Follower:
    """Follows all answers under way: the observer of `evaluate.sampling.decoding`.

    Args:
        new_answer: makes an answer that begins, from its name.
        special: ids of tokens that rules pass over.
        names: what answers are called in the log; None takes their numbers.
        seen: called at every token once no rule can fire at it any more.
        exact: whether `seen` needs the token's features: it is read at once then.
    """

    def __init__(
        self,
        reader: TokenReader,
        new_answer: Callable[[int], AnswerUnderWay],
        actions: Sequence[AnswerAction],
        special: Set[int],
        names: Sequence[int] | None = None,
        seen: Seen | None = None,
        exact: Callable[[], bool] = lambda: False,
    ) -> None:
        self.reader, self.new_answer, self.actions, self.special = reader, new_answer, actions, special
        self.names, self.seen, self.exact = names, seen, exact
        self._unread: list[tuple[Activations, list[tuple[AnswerUnderWay, int | None]]]] = []
        self.answers: dict[int, AnswerUnderWay] = {}
        self._steers = any(not isinstance(action, LogAnswer) for action in actions)

    def before(self, numbers: Sequence[int | None]) -> None:
        """Put the pushes of the rows of the next pass on."""
        if self._steers:
            wanted = [None if n is None or n not in self.answers else self.answers[n].push for n in numbers]
            self.reader.push(wanted)

    def after(self, rows: Sequence[int], numbers: Sequence[int], made: Sequence[Sequence[int]]) -> Collection[int]:
        """Read the tokens that were run, let the rules judge them and the actions act; gives the answers that end."""
        answers = [self._answer(number) for number in numbers]
        tokens = [run[-1] if run else None for run in made]
        x = self.reader.latest(rows)
        self._unread.append((x, list(zip(answers, tokens, strict=True))))
        if not self.reader.waits or len(self._unread) >= BLOCK or self.exact() or self._may_alarm(x, answers, tokens):
            self._read()
        for answer, run in zip(answers, made, strict=True):
            if self.seen is not None and run:
                self.seen(answer, len(run) - 1, run[-1])
        return {number for number, answer in zip(numbers, answers, strict=True) if answer.stopped}

    def end(self, number: int) -> AnswerUnderWay:
        """The answer is over; rules that waited for more tokens judge it now."""
        self._read()
        answer = self.answers.pop(number)
        if not answer.stopped:
            end_of_answer(answer, max(0, len(answer.values) - 1), self.actions)
        return answer

    def _answer(self, number: int) -> AnswerUnderWay:
        if number not in self.answers:
            self.answers[number] = self.new_answer(number if self.names is None else self.names[number])
        return self.answers[number]

    def _may_alarm(self, x: Activations, answers: Sequence[AnswerUnderWay], tokens: Sequence[int | None]) -> bool:
        """Whether a rule could fire at one of these tokens: then they are read at once, so that no alarm comes late."""
        bounds = self.reader.bounds(x)
        if bounds is None:
            return True
        found = False
        for answer, token, low, high in zip(answers, tokens, *(b.tolist() for b in bounds), strict=True):
            if token is not None and token not in self.special:
                may = [state.foresee(low[state.column], high[state.column]) for state in answer.states]
                found = found or any(may)
        return found

    def _read(self) -> None:
        """Read all tokens that wait, in one pass through the dictionary, and let the rules judge them in order."""
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        x = {place: torch.cat([part[place] for part, _ in unread]) for place in unread[0][0]}
        values = self.reader.columns(x).cpu().numpy()
        for value, (answer, token) in zip(values, (pair for _, pairs in unread for pair in pairs), strict=True):
            if token is None:
                answer.prompt = value
                continue
            answer.values.append(value)
            if token not in self.special and not answer.stopped:
                alarm(answer, len(answer.values) - 1, value, self.actions)
        for answer in self.answers.values():
            for state in answer.states:
                state.ahead.clear()


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
