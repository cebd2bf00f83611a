"""Judges: one protocol over endpoints, local models and a cache (see `run.CachedJudge`)."""

from persona_probe.evaluate.judges.cache import JudgementCache
from persona_probe.evaluate.judges.http import Endpoint, Retry
from persona_probe.evaluate.judges.judge import CachedJudge, Progress
from persona_probe.evaluate.judges.protocols import Criterion, Summary, summarise
from persona_probe.evaluate.judges.replies import Budget, Item, Judge, Judgement, Plan, Prices

__all__ = [
    "Budget",
    "CachedJudge",
    "Criterion",
    "Endpoint",
    "Item",
    "Judge",
    "Judgement",
    "JudgementCache",
    "Plan",
    "Prices",
    "Progress",
    "Retry",
    "Summary",
    "summarise",
]
