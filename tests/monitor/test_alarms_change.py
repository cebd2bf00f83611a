"""CUSUM and EWMA against hand-computed series, their formulas, and the run lengths of the literature."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from persona_probe.monitor.rules.change import Cusum, CusumState, Ewma
from persona_probe.monitor.rules.rule import Rule
from tests.monitor.alarm_readings import alarm_steps, feature, reading


def test_cusum_by_hand() -> None:
    rule = Cusum(drift=0.5, threshold=2.0)
    ups, downs = [], []
    for step, shift in enumerate([1.0, 0.25, -1.5, 1.5, 1.25, 0.75]):
        assert rule.update(reading(step, shift)) is None
        state = rule._memory.states["persona", "probe"]
        assert isinstance(state, CusumState)
        ups.append(state.up)
        downs.append(state.down)
    assert ups == pytest.approx([0.5, 0.25, 0.0, 1.0, 1.75, 2.0])
    assert downs == pytest.approx([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    alarm = rule.update(reading(6, 0.625))
    assert alarm is not None and (alarm.value, alarm.threshold) == pytest.approx((2.125, 2.0))
    assert alarm.message == "'persona' changed: upward sum 2.12 above 2 (shift +0.62 base sd)"


def test_cusum_falls_too_unless_told_otherwise() -> None:
    falls = [-1.5, -1.5, -1.5]
    assert alarm_steps(Cusum(0.5, 1.5), falls) == [1]
    assert alarm_steps(Cusum(0.5, 1.5, side="up"), falls) == []
    assert alarm_steps(Cusum(0.5, 1.5, side="down"), falls) == [1]
    fall = Cusum(0.5, 0.5).update(reading(0, -1.5))
    assert fall is not None and "downward sum 1 above 0.5" in fall.message


def test_cusum_is_armed_again_near_the_base_and_starts_at_zero() -> None:
    rule = Cusum(0.5, 1.9)
    # Fires at step 1, stays out for three readings, is back at step 5; then it takes two readings again.
    assert alarm_steps(rule, [1.5, 1.5, 1.5, 1.5, 3, 0.4, 1.5, 1.5]) == [1, 7]


def test_cusum_finds_where_a_change_began() -> None:
    rule, inside = Cusum(0.25, 2.0), []
    for step, shift in enumerate([0.1, -0.1, 0.2, 0.9, 0.9, 0.9, 0.9]):
        rule.update(reading(step, shift))
        inside.append(rule.inside)
    assert rule.firing and inside == [True, True, True, False, False, False, False]


def test_ewma_by_hand() -> None:
    rule = Ewma(lam=0.5, width=1.0)
    assert rule.limit(1) == pytest.approx(0.5)
    assert rule.limit(2) == pytest.approx(math.sqrt((1 - 0.5**4) / 3))
    assert rule.limit(1000) == pytest.approx(math.sqrt(1 / 3))
    assert Ewma(0.1, 2.7, sd=0.5).limit(3) == pytest.approx(2.7 * 0.5 * math.sqrt(0.1 / 1.9 * (1 - 0.9**6)))
    assert rule.update(reading(0, 0.9)) is None  # z 0.45, limit 0.5
    alarm = rule.update(reading(1, 0.7))  # z 0.575, limit 0.559
    assert alarm is not None
    assert (alarm.value, alarm.threshold) == pytest.approx((0.575, rule.limit(2)))


def test_ewma_of_weight_one_is_the_shift_itself() -> None:
    assert Ewma(1.0, 2.0).limit(1) == Ewma(1.0, 2.0).limit(9) == 2.0
    assert alarm_steps(Ewma(1.0, 2.0), [1.9, 2.1, 2.1, 0, -2.1]) == [1, 4]
    assert alarm_steps(Ewma(1.0, 2.0, side="up"), [1.9, 2.1, 2.1, 0, -2.1]) == [1]
    assert alarm_steps(Ewma(1.0, 2.0, side="down"), [1.9, 2.1, 2.1, 0, -2.1]) == [4]
    low = Ewma(1.0, 2.0).update(reading(0, -3))
    assert low is not None and (low.value, low.threshold) == pytest.approx((-3, -2))


def run_length(make: Callable[[], Rule], runs: int, mean: float = 0.0) -> float:
    """Mean readings to the first alarm on independent unit-normal shifts."""
    rng, lengths = np.random.default_rng(0), []
    for _ in range(runs):
        rule, step = make(), 0
        while rule.update(reading(step, feature(float(rng.normal(mean)), base_sd=1.0))) is None:
            step += 1
        lengths.append(step + 1)
    return float(np.mean(lengths))


@pytest.mark.parametrize(
    ("make", "mean", "literature"),
    [
        # Montgomery, Introduction to Statistical Quality Control, tables of the two-sided tabular CUSUM, h = 4.
        (lambda: Cusum(0.5, 4.0), 0.0, 168.0),
        (lambda: Cusum(0.5, 4.0), 1.0, 8.38),
        # Lucas and Saccucci 1990: lambda 0.4, L 3.054 gives 500 in control and 14.3 at one standard deviation.
        (lambda: Ewma(0.4, 3.054), 1.0, 14.3),
    ],
)
def test_run_lengths_are_those_of_the_literature(make: Callable[[], Rule], mean: float, literature: float) -> None:
    assert run_length(make, 300, mean) == pytest.approx(literature, rel=0.12)
