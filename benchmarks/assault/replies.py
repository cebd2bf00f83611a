"""Faulty replies of a judge: no answer is lost, none is asked for twice, and nothing else ends the run."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.assault.counts import Count, Settings
from benchmarks.assault.faulty_replies import FAULTS, SECRET, Fault
from benchmarks.assault.reply_server import ReplyServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from persona_probe.evaluate.judges.judge import CachedJudge
    from persona_probe.evaluate.judges.replies import Judgement

_VARIABLE = "PERSONA_PROBE_ASSAULT_KEY"
_RETRIES = 1
_WELL = [f"well {n}" for n in range(16)]
"""Answers that are judged first: an endpoint that never gave a reply is not there, which ends a run."""
KINDS = ("by probabilities", "sampled", "slow")
"""Kinds of faults that are driven apart, for each takes another judge."""
_SHORT = 4
"""The short form takes every so many of the faults."""


@dataclass(frozen=True)
class Driven:
    """What came of the faults of one kind of judge."""

    faults: Mapping[str, Fault]
    first: "Mapping[str, Judgement]"
    """Under the faults, by their names."""
    second: "Mapping[str, Judgement]"
    """The same answers again, by an endpoint that is well."""
    asked: Mapping[str, int]
    """How often the faulty endpoint was asked about each."""
    asked_again: Mapping[str, int]
    """How often the one that is well was."""

    def unlike(self) -> list[str]:
        """Answers that did not become what they should, or failed without the right reason."""
        lines = []
        for name, fault in self.faults.items():
            found = self.first[name]
            became = found.label if found.score is None else round(found.score, 6)
            if became != fault.then:
                lines.append(f"{name}: {became} in place of {fault.then} {found.error}")
            elif fault.then == "failed" and (not found.error or fault.because not in found.error):
                lines.append(f"{name}: the reason is {found.error!r}, without {fault.because!r}")
            elif SECRET in f"{found.error}{found.tokens}" or not found.error.isprintable():
                lines.append(f"{name}: what is shown holds the key or control characters")
        return lines

    def asked_twice(self) -> list[str]:
        """Answers that were asked for again after their reply had come whole, in this run or the next."""
        lines = []
        for name, fault in self.faults.items():
            most = 1 if fault.paid else 1 + _RETRIES
            if not 1 <= self.asked[name] <= most:
                lines.append(f"{name}: asked {self.asked[name]} times")
            if (self.asked_again.get(name, 0) > 0) != (self.first[name].label == "failed"):
                lines.append(f"{name}: asked {self.asked_again.get(name, 0)} times by the next run")
        return lines

    def lost(self) -> list[str]:
        """Answers that a next run, by an endpoint that is well, does not judge."""
        return [f"{name}: {found.label}" for name, found in self.second.items() if not _is_settled(found)]


def _is_settled(found: "Judgement") -> bool:
    return found.label not in ("failed", "not asked")


def kind_of(fault: Fault) -> str:
    """One of `KINDS`."""
    return "slow" if fault.slow else "sampled" if fault.sampled else "by probabilities"


def drive(faults: Mapping[str, Fault], place: Path, kind: str) -> Driven:
    """Have a judge ask a local endpoint that answers with these faults, and then one that is well."""
    names = list(faults)
    with _key(), ReplyServer({name: fault.send for name, fault in faults.items()}) as server:
        first = _judged(_judge(server.url, place, kind), names)
        asked = dict(server.asked)
        server.faults.clear()
        server.asked.clear()
        second = _judged(_judge(server.url, place, kind), names)
        return Driven(faults, first, second, asked, dict(server.asked))


def _judge(url: str, place: Path, kind: str) -> "CachedJudge":
    from persona_probe.evaluate.judges.cache import JudgementCache
    from persona_probe.evaluate.judges.http import Endpoint, HttpBackend
    from persona_probe.evaluate.judges.judge import CachedJudge
    from persona_probe.evaluate.judges.protocols import Criterion

    settings: dict[str, Any] = {"max_retries": _RETRIES, "concurrency": 16, "samples": int(kind == "sampled")}
    endpoint = Endpoint("judge", url, _VARIABLE, timeout=1.5 if kind == "slow" else 20.0, **settings)
    criterion = Criterion("assault", "{question}|{answer}", labels=("CODE", "REFUSAL"))
    return CachedJudge(criterion, HttpBackend(endpoint), JudgementCache(place / "judgements.sqlite"))


def _judged(judge: "CachedJudge", names: Sequence[str]) -> "dict[str, Judgement]":
    from persona_probe.evaluate.judges.replies import Item

    found = judge.judge([Item(name, "An answer.", name) for name in [*_WELL, *names]])
    judge.cache.close()
    return {judgement.id: judgement for judgement in found[len(_WELL) :]}


@contextmanager
def _key() -> "Iterator[None]":
    """The key in the environment, and the log of attempts off."""
    logger = logging.getLogger("persona_probe")
    level = logger.level
    os.environ[_VARIABLE] = SECRET
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        del os.environ[_VARIABLE]


def assault(settings: Settings) -> list[Count]:
    """Drive a judge with every fault."""
    driven = []
    for kind in KINDS:
        faults = {name: fault for name, fault in FAULTS.items() if kind_of(fault) == kind}
        chosen = dict(list(faults.items())[:: _SHORT if settings.short else 1])
        place = settings.place / kind
        place.mkdir(parents=True)
        driven.append(drive(chosen, place, kind))
    tried = sum(len(one.faults) for one in driven)
    return [
        Count("faulty replies: scored, set aside or failed with the reason", tried, _lines(driven, Driven.unlike)),
        Count("faulty replies: none asked for again once it came", tried, _lines(driven, Driven.asked_twice)),
        Count("faulty replies: judged by the next run", tried, _lines(driven, Driven.lost)),
    ]


def _lines(driven: Sequence[Driven], of: Any) -> list[str]:
    return [line for one in driven for line in of(one)]
