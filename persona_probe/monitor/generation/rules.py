"""Rules on one answer: when a feature has been beyond a threshold for some tokens, as the answer is written."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view

from persona_probe.errors import InputError, unknown
from persona_probe.monitor.calibration import SIDES

OVER = ("mean", "min")
ROUNDING = 1e-4
"""Relative difference within which a value equals its threshold: last digits differ between batches."""


@dataclass(frozen=True)
class AnswerRule:
    """Alarms once a feature's last `window` tokens are together beyond a threshold; once for each answer.

    The level at a token is the mean (or the smallest) of the feature over the last `window` tokens; that of an answer
    which is shorter is over all its tokens, when it ends. An answer's score is its highest level, so the answer alarms
    if and only if its score exceeds the threshold, and the threshold is calibrated on scores of clean answers.
    Special tokens and values that are missing are passed over.

    Raises:
        InputError: a window below 1, an unknown side or kind of level, or a threshold that is not finite.
    """

    feature: str
    """The feature's name."""
    window: int = 8
    """Tokens that count together; 1 looks at every token alone."""
    over: str = "mean"
    """`mean`, or `min`: all of them must be beyond the threshold."""
    side: str = "above"
    """`above`, `below`, or `both` (the absolute value)."""
    threshold: float | None = None
    """In the feature's units; None until it is calibrated: the rule is then silent."""
    name: str | None = None
    """Its name in alarms; None takes the feature's."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"window must be at least 1 token, not {self.window}")
        if self.side not in SIDES:
            raise unknown("side", self.side, SIDES)
        if self.over not in OVER:
            raise unknown("over", self.over, OVER)
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise InputError(f"the threshold of rule {self.title!r} must be finite, not {self.threshold}")

    @property
    def title(self) -> str:
        """The rule's name."""
        return self.feature if self.name is None else self.name

    def describe(self) -> str:
        """The rule in one line, with its numbers."""
        tokens = "a token" if self.window == 1 else f"{self.over} of {self.window} tokens"
        limit = "not calibrated" if self.threshold is None else f"{self.threshold:.4g}"
        return f"{self.title}: {tokens} of {self.feature!r} {self.side} {limit}"

    def oriented(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The values so that higher is nearer to an alarm."""
        return {"above": values, "below": -values, "both": np.abs(values)}[self.side]

    def score(self, values: Float[np.ndarray, " tokens"]) -> float:
        """An answer's highest level, oriented; -inf for an answer without a reading."""
        finite = self.oriented(values)[np.isfinite(values)].astype(np.float64)
        if not len(finite):
            return -math.inf
        windows = sliding_window_view(finite, min(self.window, len(finite)))
        return float((windows.mean(axis=1) if self.over == "mean" else windows.min(axis=1)).max())

    def exceeds(self, level: float) -> bool:
        """Whether an oriented level is beyond the threshold; never without one."""
        limit = self.limit
        return limit is not None and level > limit and not math.isclose(level, limit, rel_tol=ROUNDING)

    @property
    def limit(self) -> float | None:
        """The threshold, oriented as levels are."""
        return -self.threshold if self.side == "below" and self.threshold is not None else self.threshold


@dataclass
class RuleState:
    """A rule following one answer."""

    rule: AnswerRule
    column: int
    """The feature's place among those that are read."""
    recent: deque[float] = field(default_factory=deque)
    fired: bool = False
    ahead: list[float] = field(default_factory=list)
    """What the feature of the tokens that are not read yet can be at most, oriented."""

    def foresee(self, low: float, high: float) -> bool:
        """Take the lowest and highest that a token's feature can be; returns whether the alarm could go off at it."""
        if self.fired or not math.isfinite(high):
            return False
        self.ahead.append({"above": high, "below": -low, "both": max(abs(low), abs(high))}[self.rule.side])
        levels = [*self.recent, *self.ahead][-self.rule.window :]
        limit = self.rule.limit
        if limit is None or len(levels) < self.rule.window:
            return False
        level = sum(levels) / len(levels) if self.rule.over == "mean" else min(levels)
        return level >= limit - ROUNDING * abs(limit)

    def update(self, values: Sequence[float]) -> float | None:
        """Take a token's features; returns the level that raises the alarm, in the feature's units, or None."""
        value = float(values[self.column])
        if self.fired or not math.isfinite(value):
            return None
        self.recent.append(float(self.rule.oriented(np.array([value]))[0]))
        if len(self.recent) < self.rule.window:
            return None
        fired = self._judge()
        self.recent.popleft()
        return fired

    def end(self) -> float | None:
        """The answer is over: one that is shorter than the window is judged now."""
        return None if self.fired or self._judged or not self.recent else self._judge()

    _judged: bool = False

    def _judge(self) -> float | None:
        self._judged = True
        level = sum(self.recent) / len(self.recent) if self.rule.over == "mean" else min(self.recent)
        if not self.rule.exceeds(level):
            return None
        self.fired = True
        return -level if self.rule.side == "below" else level
