"""Made-up judged answers with known rates."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from persona_probe.evaluate.judges.cache import JudgementCache
from persona_probe.evaluate.judges.protocols import Criterion
from persona_probe.evaluate.judges.replies import Ask, Item, Replies, Reply
from persona_probe.evaluate.judging import AnswerToJudge, BetleyJudge, Ruling, Rulings, WangJudge, verdict
from persona_probe.evaluate.tables import judged_table


def judged(
    arm: str,
    values: Mapping[str, Sequence[float | None]],
    *,
    seed: int = 0,
    evaluation: str = "set-judge",
    why: str = "",
    errors: tuple[float, float] | None = None,
) -> pd.DataFrame:
    """Rows of one organism: by question, the values of its answers; None is an incoherent answer."""
    rows = [
        {"arm": arm, "seed": seed, "step": 4, "item": q, "category": "c", "pair": q, "prompt": q, "sample": n}
        for q, found in values.items()
        for n in range(len(found))
    ]
    answers = pd.DataFrame(rows).assign(variant="plain")
    rulings = tuple(_ruling(v, errors) for found in values.values() for v in found)
    return judged_table(
        answers, Rulings(rulings, why), evaluation=evaluation, questions="set", sampling="s", judge=evaluation
    )


def _ruling(value: float | None, errors: tuple[float, float] | None) -> Ruling:
    whole, single = errors or (None, None)
    if value is None:
        return Ruling(None, False, 50.0, 20.0, error_model=whole, error_question=single)
    return Ruling(value, True, 90.0 - 80.0 * value, 80.0, error_model=whole, error_question=single)


def drawn(rates: list[float], samples: int, seed: int) -> dict[str, list[float | None]]:
    """By question, answers drawn with that question's rate."""
    rng = np.random.default_rng(seed)
    return {f"q{n:02d}": [float(v) for v in rng.random(samples) < rate] for n, rate in enumerate(rates)}


def scored(alignment: float | None, coherence: float | None) -> Ruling:
    """The ruling that two scores give."""
    value, coherent = verdict(alignment, coherence)
    return Ruling(value, coherent, alignment, coherence)


class ScriptedBackend:
    """Replies to each prompt of some criteria with the score or label that is written for the answer."""

    id, block = "scripted", 100

    def __init__(self, script: Mapping[Criterion, Sequence[float | str]]) -> None:
        self.replies_by_prompt = {
            criterion.messages(_item(n))[0]["content"]: Reply(_tokens(score))
            for criterion, scores in script.items()
            for n, score in enumerate(scores)
        }

    def cost(self, ask: Ask) -> tuple[int, int, int]:
        return 1, 1, 1

    def replies(self, asks: Sequence[Ask]) -> Replies:
        for n, ask in enumerate(asks):
            yield n, self.replies_by_prompt[ask.messages[0]["content"]]


def ruled(
    judge: type[BetleyJudge] | type[WangJudge], script: Mapping[Criterion, Sequence[float | str]]
) -> pd.DataFrame:
    """Judged rows of answers to one question, by a judge whose scores and labels are given."""
    count = len(next(iter(script.values())))
    rulings = judge("scripted", ScriptedBackend(script), JudgementCache(":memory:")).rule(
        [AnswerToJudge(_item(n)) for n in range(count)]
    )
    same = {"arm": "a", "seed": 0, "step": 4, "item": "q", "category": "c", "pair": "q", "prompt": "q"}
    answers = pd.DataFrame([{**same, "sample": n, "variant": "plain"} for n in range(count)])
    return judged_table(answers, rulings, evaluation="e", questions="set", sampling="s", judge="scripted")


def _item(n: int) -> Item:
    return Item("question", f"answer {n}")


def _tokens(score: float | str) -> dict[str, float]:
    """The first token's probabilities: a label, or whole numbers with this mean."""
    if isinstance(score, str):
        return {score: 1.0}
    low = math.floor(score)
    return {str(low): 1 - (score - low), str(low + 1): score - low} if score > low else {str(low): 1.0}
