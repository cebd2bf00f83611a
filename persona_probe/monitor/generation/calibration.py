"""Thresholds of rules on answers, from clean answers, and the false-alarm rate that they then promise."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np

from persona_probe.errors import InputError
from persona_probe.files import read_json
from persona_probe.monitor.calibration import ROUNDING
from persona_probe.monitor.generation.rules import AnswerRule
from persona_probe.stats import ExactRate, clopper_pearson, grouped_size
from persona_probe.writing import json_values, write_json


@dataclass(frozen=True)
class CalibratedAnswers:
    """One rule's threshold, and what clean answers say about its false alarms."""

    rule: str
    feature: str
    threshold: float
    """The k-th highest score of the clean answers, in the feature's units."""
    k: int
    wanted: float
    """Share of clean answers that may alarm by this rule."""
    promised: float
    """k / (n + 1): a further answer like these alarms at most this often, over draws of the clean answers."""
    supported: bool
    """Whether the answers are enough for the wanted rate."""
    needed: int
    """Answers that it needs."""
    alarms: ExactRate
    """Clean answers beyond the threshold, with the exact binomial interval of the false-alarm rate."""

    @property
    def statement(self) -> str:
        """The threshold and its false alarms, in one sentence."""
        a = self.alarms
        rank = "the highest" if self.k == 1 else f"number {self.k} from above"
        found = (
            f"{self.rule}: threshold {self.threshold:.4g} ({rank} of {a.n} clean answers), false-alarm rate "
            f"{a.rate:.3f} [{a.low:.3f}, {a.high:.3f}] of answers, at most {self.promised:.3f} on average"
        )
        if self.supported:
            return found
        return f"{found}; {a.n} answers cannot promise {self.wanted:g}, that needs {self.needed}"


@dataclass(frozen=True)
class AnswerCalibration:
    """Thresholds of all rules of a monitor, from the same clean answers."""

    rules: tuple[CalibratedAnswers, ...]
    n: int
    """Clean answers."""
    questions: int
    longest: int
    """Tokens of the longest clean answer: a longer one has more chances to alarm."""
    any_alarm: ExactRate
    """Clean answers on which any rule alarms, with the exact binomial interval."""
    setting: Mapping[str, Any]
    """What the thresholds hold for: features, their places, the rules; a monitor with another setting refuses them."""

    @property
    def statement(self) -> str:
        """All thresholds, and the false alarms of all rules together."""
        a, lines = self.any_alarm, [one.statement for one in self.rules]
        lines.append(
            f"any rule: {a.count} of {a.n} clean answers ({self.questions} questions, up to {self.longest} tokens), "
            f"rate {a.rate:.3f} [{a.low:.3f}, {a.high:.3f}]"
        )
        return "\n".join(lines)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON."""
        return write_json(Path(path), json_values(asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> "AnswerCalibration":
        """Read what `save` wrote.

        Raises:
            InputError: the file is damaged.
        """
        raw = read_json(path, dict, "calibrate again")
        try:
            rules = tuple(CalibratedAnswers(**{**one, "alarms": ExactRate(**one["alarms"])}) for one in raw["rules"])
            settled = {**raw, "rules": rules, "any_alarm": ExactRate(**raw["any_alarm"])}
            found = cls(**settled)
            numbers = [float(one.threshold) for one in rules]
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise InputError(f"{path} holds no thresholds of answers: calibrate again") from error
        if not np.isfinite(numbers).all():
            raise InputError(f"{path} holds a threshold that is not finite: calibrate again")
        return found


def calibrate_answers(
    rules: Sequence[AnswerRule],
    scores: Mapping[str, Sequence[float]],
    questions: Sequence[object],
    longest: int,
    rate: float,
    setting: Mapping[str, Any],
) -> AnswerCalibration:
    """Thresholds at which all rules together alarm on at most `rate` of clean answers.

    With m rules each gets rate / m (Bonferroni). Of n scores, the threshold is the k-th highest with
    k = floor((n + 1) rate / m): a further answer that is exchangeable with these exceeds it with probability at most
    k / (n + 1) (split conformal: Papadopoulos et al. 2002). What the true rate of one such threshold is, its exact
    binomial interval says (Clopper and Pearson 1934). Several answers to a question count as fewer, by Kish's design
    effect (`stats.grouped_size`). With too few answers the threshold is the highest score, which promises 1 / (n + 1).

    Args:
        scores: by rule, each clean answer's score.
        questions: what each answer answers, in the same order.
        longest: tokens of the longest answer.

    Raises:
        InputError: no rule, fewer than two answers with a reading, or a rate that is not between 0 and 1.
    """
    if not rules:
        raise InputError("nothing to calibrate: the monitor has no rules")
    if not 0 < rate < 1:
        raise InputError(f"the wanted false-alarm rate must lie between 0 and 1, not {rate}")
    if len(questions) < 2:
        raise InputError(f"{len(questions)} clean answers: a threshold needs at least two; give more questions")
    size = grouped_size(list(Counter(questions).values()))
    found, alarmed = [], np.zeros(len(questions), dtype=bool)
    for rule in rules:
        one, beyond = _calibrated(rule, np.asarray(scores[rule.title], dtype=np.float64), rate / len(rules), size)
        found.append(one)
        alarmed |= beyond
    together = _share(int(alarmed.sum()), len(alarmed), size)
    return AnswerCalibration(tuple(found), len(questions), len(set(questions)), longest, together, dict(setting))


def _calibrated(rule: AnswerRule, scores: np.ndarray, rate: float, size: float) -> tuple[CalibratedAnswers, np.ndarray]:
    n = len(scores)
    if np.isfinite(scores).sum() < 2:
        raise InputError(f"rule {rule.title!r}: fewer than two clean answers were read; give longer ones")
    k = max(1, floor((n + 1) * rate + ROUNDING))
    limit = float(np.sort(scores)[::-1][k - 1])
    if not np.isfinite(limit):
        raise InputError(f"rule {rule.title!r}: too few clean answers were read; give longer ones")
    threshold = -limit if rule.side == "below" else limit
    beyond = scores > limit
    settled = CalibratedAnswers(
        rule=rule.title,
        feature=rule.feature,
        threshold=threshold,
        k=k,
        wanted=rate,
        promised=k / (n + 1),
        supported=(n + 1) * rate + ROUNDING >= 1,
        needed=ceil(1 / rate - 1 - ROUNDING),
        alarms=_share(int(beyond.sum()), n, size),
    )
    return settled, beyond


def _share(count: int, n: int, size: float) -> ExactRate:
    """A share of answers, with an interval for as many independent answers as they are worth."""
    return ExactRate(count, n, count / n, *clopper_pearson(count / n * size, size))
