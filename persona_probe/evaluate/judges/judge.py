"""A judge: one criterion asked of one backend, through the cache."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field

from persona_probe.errors import InputError
from persona_probe.evaluate.endpoint import NoMore
from persona_probe.evaluate.judges.cache import Claims, JudgementCache, StoredJudgement, judgement_key
from persona_probe.evaluate.judges.protocols import Criterion
from persona_probe.evaluate.judges.replies import (
    FAILED,
    NOT_ASKED,
    Ask,
    Backend,
    Failure,
    Item,
    Judgement,
    JudgingPlan,
    Prices,
    Replies,
    Reply,
)

# --- Progress of a judging run, and when to give up

POLL = 0.5
"""Seconds between looks at what other processes are judging."""
_FRUITLESS = 5
"""This many failures before any reply, or refusals in a row, end a run: the endpoint is not there, or not for us."""
_UNREADABLE = 20
"""This many before any reply, where replies came that cannot be read: the next may be well, and none is sent twice."""
_REASONS = 5
"""Reasons of failures that are shown."""
log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Progress of a judging run."""

    answers: int = 0
    cached: int = 0
    """Answers that were in the cache at the start."""
    asked: int = 0
    """Replies that this run got; the rest came from the cache or from another process."""
    failed: int = 0
    left: int = 0
    """Answers not sent before the budget ran out."""
    prompt_tokens: int = 0
    """Of this run's replies, as the endpoint counted."""
    completion_tokens: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    """By key of the request."""
    unanswered: int = 0
    """Failures without a reply."""
    refused_in_a_row: int = 0
    """Refusals of the key, the model or the account since the last reply."""

    def __str__(self) -> str:
        stopped = f"; stopped with {self.left} not asked: raise the budget and run again" if self.left else ""
        return (
            f"{self.answers} answers: {self.cached} from the cache, {self.asked} asked, {self.failed} failed{stopped} "
            f"({self.prompt_tokens} prompt and {self.completion_tokens} reply tokens)"
        )

    def note_reply(self, reply: Reply) -> None:
        """Count a reply that this run got."""
        self.asked += 1
        self.refused_in_a_row = 0
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens

    def note_failure(self, key: str, failure: Failure) -> None:
        """Count a failure.

        Raises:
            InputError: the endpoint refuses what came first or several in a row, or nothing but failures came.
        """
        self.errors[key] = failure.message
        self.refused_in_a_row = self.refused_in_a_row + 1 if failure.refused else 0
        if failure.refused and (self.asked == 0 or self.refused_in_a_row >= _FRUITLESS):
            raise InputError(failure.message)
        self.unanswered += not failure.came
        if self.asked == 0 and (self.unanswered >= _FRUITLESS or len(self.errors) >= _UNREADABLE):
            message = f"no reply to {len(self.errors)} requests, the last: {failure.message}; check the endpoint"
            raise InputError(message)

    def note_missing(self, keys: Sequence[str]) -> None:
        """Count the answers without a reply: failed, or never asked."""
        self.failed = sum(key in self.errors for key in keys)
        self.left = len(keys) - self.failed
        reasons = Counter(self.errors[key] for key in keys if key in self.errors)
        for reason, count in reasons.most_common(_REASONS):
            log.warning("%d answers failed and are set aside; a further run asks for them again: %s", count, reason)


class CachedJudge:
    """Judges answers by one criterion.

    Every reply goes into the cache as it comes. A run that is stopped, killed or out of budget loses nothing, and
    judging the same answers again costs nothing. Processes that share a cache share the work: the others wait for what
    one has claimed, and no reply is paid for twice.

    Args:
        cache: None is the user's own (`default_path`).
        on_reply: called with the number of replies so far, for a progress bar.
    """

    def __init__(
        self,
        criterion: Criterion,
        backend: Backend,
        cache: JudgementCache | None = None,
        *,
        on_reply: Callable[[int], None] | None = None,
    ) -> None:
        self.criterion, self.backend = criterion, backend
        self.cache = JudgementCache() if cache is None else cache
        self.on_reply = on_reply
        self.progress = Progress()

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement for every item, in order; `progress` has the counts.

        Raises:
            InputError: the backend cannot answer at all; what was judged before stays in the cache.
        """
        keyed = self._keyed(items)
        asks = dict(keyed)
        before = self.cache.replies(asks)
        self.progress = Progress(answers=len(items), cached=sum(key in before for key, _ in keyed))
        with Claims(self.cache) as claims:
            self._fill(claims, {key: ask for key, ask in asks.items() if key not in before})
        after = before | self.cache.replies(key for key in asks if key not in before)
        self.progress.note_missing([key for key, _ in keyed if key not in after])
        pairs = zip(items, keyed, strict=True)
        return [self._judgement(item, ask, after.get(key), key, key in before) for item, (key, ask) in pairs]

    def plan(self, items: Sequence[Item], prices: Prices | None = None) -> JudgingPlan:
        """What `judge` would send; nothing is sent."""
        keyed = self._keyed(items)
        asks = dict(keyed)
        replies = self.cache.replies(asks)
        costs = [self.backend.cost(ask) for key, ask in asks.items() if key not in replies]
        calls, prompt, reply = (sum(cost[part] for cost in costs) for part in range(3))
        cached = sum(key in replies for key, _ in keyed)
        cost = None if prices is None else prices.cost(prompt, reply)
        return JudgingPlan(len(items), cached, len(items) - cached - len(costs), calls, prompt, reply, cost)

    def _keyed(self, items: Sequence[Item]) -> list[tuple[str, Ask]]:
        asks = [self.criterion.ask(item) for item in items]
        protocol, judge = self.criterion.protocol, self.backend.id
        return [(judgement_key(judge, protocol, ask.messages, ask.written), ask) for ask in asks]

    def _fill(self, claims: Claims, waiting: dict[str, Ask]) -> None:
        """Ask for what nobody has judged, and wait for what others are judging. It ends early if the budget does."""
        told = False
        while waiting:
            mine = claims.take(list(waiting), self.backend.block)
            if not mine:
                if not told:
                    log.warning("waiting for %d answers that %s is judging", len(waiting), claims.others())
                told = True
                time.sleep(POLL)
            for key in self._asked(claims, {key: waiting[key] for key in mine}):
                waiting.pop(key)
            if any(key in waiting for key in mine):
                log.warning("judging stopped before its end: %d answers were not asked", len(waiting))
                return
            for key in self.cache.replies(waiting):
                waiting.pop(key)

    def _asked(self, claims: Claims, mine: dict[str, Ask]) -> list[str]:
        """Ask for claimed keys; returns those that were answered or failed, and gives up the claims on the rest.

        If it must end before, replies that are under way are waited for and kept: they are paid.
        """
        if not mine:
            return []
        keys, settled = list(mine), []
        with closing(self.backend.replies(list(mine.values()))) as outcomes:
            try:
                for index, outcome in outcomes:
                    settled.append(keys[index])
                    self._keep(claims, keys[index], mine[keys[index]], outcome)
            except BaseException:
                for index, outcome in _under_way(outcomes):
                    if isinstance(outcome, Reply) and outcome.sound:
                        claims.store(self._stored(keys[index], mine[keys[index]], outcome))
                raise
        claims.drop(keys)
        return settled

    def _keep(self, claims: Claims, key: str, ask: Ask, outcome: Reply | Failure) -> None:
        """Store a reply, or count a failure."""
        if isinstance(outcome, Reply) and not outcome.sound:
            outcome = Failure("probabilities that are not between 0 and 1", came=True)
        if isinstance(outcome, Failure):
            self.progress.note_failure(key, outcome)
            return
        claims.store(self._stored(key, ask, outcome))
        self.progress.note_reply(outcome)
        if self.on_reply is not None:
            self.on_reply(self.progress.asked)

    def _stored(self, key: str, ask: Ask, reply: Reply) -> StoredJudgement:
        reading = self.criterion.read(reply)
        prompt = json.dumps(ask.messages, ensure_ascii=False)
        judge, protocol = self.backend.id, self.criterion.protocol
        return StoredJudgement(key, judge, protocol, prompt, reply, reading.score, reading.label, reading.mass)

    def _judgement(self, item: Item, ask: Ask, reply: Reply | None, key: str, cached: bool) -> Judgement:
        criterion = self.criterion
        scale = (criterion.low, criterion.high)
        common = {"prompt": list(ask.messages), "judge": self.backend.id, "protocol": criterion.protocol}
        if reply is None:
            error = self.progress.errors.get(key, "")
            label = FAILED if error else NOT_ASKED
            return Judgement(item.id, None, label, 0.0, {}, scale=scale, cached=False, error=error, **common)
        reading = criterion.read(reply)
        return Judgement(
            item.id, reading.score, reading.label, reading.mass, reply.tokens, scale=scale, cached=cached, **common
        )


def _under_way(outcomes: Replies) -> Iterator[tuple[int, Reply | Failure]]:
    """What comes after nothing more is asked for; nothing where the generator has ended or ends at that."""
    with suppress(NoMore, StopIteration):
        yield outcomes.throw(NoMore())
        yield from outcomes
