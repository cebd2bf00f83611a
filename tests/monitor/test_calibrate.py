"""Thresholds from benign runs: known answers, the conformal promise by simulation, and no extrapolation."""

from math import exp

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, norm

from persona_probe.errors import InputError
from persona_probe.monitor.calibration import HeldRule, calibrate, conformal_threshold, series_of
from persona_probe.stats import auroc_interval, exact_share, per_100

NAN = float("nan")


def peaks(*tops: float) -> dict[str, np.ndarray]:
    """Runs of three readings whose highest is the given number."""
    return {f"run-{i}": np.array([0.0, top, 0.0]) for i, top in enumerate(tops)}


@pytest.mark.parametrize(
    ("rule", "statistic"),
    [
        (HeldRule(1, "above"), 3.0),
        (HeldRule(2, "above"), 2.0),
        (HeldRule(3, "above"), 1.0),
        (HeldRule(1, "below"), 5.0),
        (HeldRule(1, "both"), 5.0),
        (HeldRule(2, "both"), 3.0),
        (HeldRule(6, "above"), -np.inf),
    ],
)
def test_the_statistic_is_the_highest_level_that_was_held(rule: HeldRule, statistic: float) -> None:
    assert rule.statistic(np.array([1.0, 2.0, 3.0, -5.0, 1.0])) == statistic


def test_a_value_that_is_missing_is_as_if_it_had_not_been_read() -> None:
    rule = HeldRule(2)
    assert rule.statistic(np.array([1.0, NAN, 2.0, 0.0])) == 1.0
    assert rule.alarms(np.array([1.0, NAN, 2.0, 0.0]), 0.5).tolist() == [2]


def test_an_alarm_goes_off_once_an_excursion_and_again_in_the_next() -> None:
    values = np.array([0.0, 2.0, 2.0, 2.0, 0.0, 2.0, 0.0, 2.0, 2.0])
    assert HeldRule(2).alarms(values, 1.0).tolist() == [2, 8]
    assert HeldRule(1).alarms(values, 1.0).tolist() == [1, 5, 7]
    assert HeldRule(1).alarms(values, 2.0).tolist() == []


def test_a_run_alarms_exactly_where_its_statistic_exceeds_the_threshold() -> None:
    rng = np.random.default_rng(0)
    for side in ("above", "below", "both"):
        for held in (1, 2, 3):
            rule, values = HeldRule(held, side), rng.normal(size=9)
            top = rule.statistic(values)
            assert len(rule.alarms(values, top)) == 0
            assert len(rule.alarms(values, top - 1e-9)) > 0


@pytest.mark.parametrize(
    ("runs", "rate", "threshold", "supported", "needed"),
    [(19, 0.05, 19, True, 19), (18, 0.05, 18, False, 19), (39, 0.05, 38, True, 19), (9, 0.25, 8, True, 3)],
)
def test_the_conformal_quantile(runs: int, rate: float, threshold: float, supported: bool, needed: int) -> None:
    found = calibrate(peaks(*range(1, runs + 1)), HeldRule(1), rate)
    assert (found.threshold, found.supported, found.needed) == (threshold, supported, needed)
    assert found.smallest_rate == pytest.approx(1 / (runs + 1))
    assert found.runs_alarmed.count == runs - threshold
    assert found.interval is None  # a bootstrap's upper end is the highest value
    assert found.rate_bound == pytest.approx(beta.ppf(0.95, runs - threshold + 1, threshold))  # Wilks 1941


def test_the_promise_holds_for_new_runs() -> None:
    rng = np.random.default_rng(1)
    for n, rate in ((9, 0.2), (19, 0.05)):
        thresholds = np.array([conformal_threshold(rng.exponential(size=n), rate) for _ in range(2000)])
        alarms = rng.exponential(size=(20, 2000)) > thresholds
        assert alarms.mean() == pytest.approx(rate, abs=0.01)  # equal where (n + 1)(1 - rate) is whole


def test_too_few_runs_say_what_would_be_needed() -> None:
    found = calibrate(peaks(1.0, 3.0, 2.0), HeldRule(1), 0.05)
    assert not found.supported and found.threshold == 3.0
    assert "3 benign runs cannot promise 0.05 false alarms per run: that needs 19" in found.statement
    assert "the least for these is 0.25" in found.statement and "interval" not in found.statement
    assert "threshold 3 (the highest of 3 benign runs): 0 of 3 benign runs alarm, at most 63% of" in found.statement
    assert found.rate_bound == pytest.approx(1 - 0.05 ** (1 / 3)) and found.to_dict()["rate_bound"] == found.rate_bound
    assert found.to_dict()["statement"] == found.statement and found.to_dict()["n_runs"] == 3
    many = calibrate(peaks(*range(40)), HeldRule(1), 0.05)
    assert "number 2 from above of 40 benign runs" in many.statement and "cannot" not in many.statement


def test_an_interval_is_printed_only_where_it_has_two_ends() -> None:
    found = calibrate(peaks(*np.linspace(1, 2, 200)), HeldRule(1), 0.1)
    assert found.interval is not None and found.interval.ci_low < found.threshold < found.interval.ci_high < 2
    assert f"95% interval over runs {found.interval.ci_low:.3g} to {found.interval.ci_high:.3g}" in found.finding
    same = calibrate(peaks(*[1.0] * 200), HeldRule(1), 0.1)
    assert same.interval is None and "interval" not in same.finding


def test_a_threshold_of_zero_is_explained_and_a_small_one_has_its_digits() -> None:
    fell = calibrate({"a": np.array([0.0, -1.0]), "b": np.array([0.0, -2.0])}, HeldRule(1), 0.05)
    assert fell.at_start and "threshold 0 (the value before training, beyond which no benign run went)" in fell.finding
    once = calibrate({"a": np.array([0.0, 1.0, -1.0]), "b": np.array([0.0, 2.0, -2.0])}, HeldRule(2), 0.05)
    assert "threshold 0 (the value before training, beyond which no benign run stayed)" in once.finding
    below = calibrate({"a": np.array([0.0, 1.0]), "b": np.array([0.0, 2.0])}, HeldRule(1, "below"), 0.05)
    assert "threshold 0 (" in below.finding  # not -0
    rose = calibrate({"a": np.array([0.0, -1.0]), "b": np.array([-1.0, 0.0])}, HeldRule(1), 0.05)
    assert not rose.at_start and "threshold 0 (the highest of 2 benign runs)" in rose.finding
    assert "threshold 0.000123 (" in calibrate(peaks(0.000123, 0.0001), HeldRule(1), 0.05).finding


def test_the_bound_on_false_alarms_knows_the_data_sets() -> None:
    runs = peaks(1.0, 2.0, 3.0, 4.0, 5.0)
    two = calibrate(runs, HeldRule(1), 0.05, sets=dict(zip(runs, "aaabb", strict=True)))
    assert "at most 45% of further runs will (exact, 95% confidence; 78% if the runs of each of the 2" in two.finding
    one = calibrate(runs, HeldRule(1), 0.05, sets=dict.fromkeys(runs, "a"))
    assert "(exact, 95% confidence, on the same data set)" in one.finding
    own = calibrate(runs, HeldRule(1), 0.05, sets=dict(zip(runs, "abcde", strict=True)))
    assert own.finding == calibrate(runs, HeldRule(1), 0.05).finding


def test_the_bounds_hold_for_new_runs_and_for_new_data_sets() -> None:
    rng, held, apart = np.random.default_rng(2), 0, 0
    for _ in range(400):
        shared = rng.normal(size=2)
        values = [*(shared[0] + 0.1 * rng.normal(size=3)), *(shared[1] + 0.1 * rng.normal(size=2))]
        alone = rng.normal(size=5)
        held += norm.sf(alone.max()) <= 1 - 0.05 ** (1 / 5)
        apart += norm.sf(max(values), scale=1.01**0.5) <= 1 - 0.05 ** (1 / 2)
    assert min(held, apart) / 400 > 0.92


def test_a_rate_per_hundred_readings_counts_excursions() -> None:
    # 20 readings: one alarm is 5 per 100. Above 2 nothing, above 1 one excursion, above 0 four.
    runs = {"a": np.array([1.0, 0, 2, 0, 0, 0, 0, 0, 0, 0]), "b": np.array([0.0, 0, 0, 1, 0, 0, 1, 0, 0, 0])}
    found = calibrate(runs, HeldRule(1), 5.0, "100 readings")
    assert (found.threshold, found.supported, found.needed) == (1.0, True, 20)
    assert (found.alarms.count, found.alarms.rate, found.runs_alarmed.count) == (1, 5.0, 1)
    assert calibrate(runs, HeldRule(1), 20.0, "100 readings").threshold == 0.0
    rare = calibrate(runs, HeldRule(1), 1.0, "100 readings")
    assert (rare.threshold, rare.supported, rare.needed, rare.alarms.count) == (2.0, False, 100, 0)
    assert "20 readings of benign runs cannot show 1 false alarms per 100 readings" in rare.statement


def test_exact_intervals_are_the_textbooks() -> None:
    assert exact_share(0, 3).high == pytest.approx(1 - 0.025 ** (1 / 3))
    assert (exact_share(0, 3).low, exact_share(3, 3).high) == (0.0, 1.0)
    assert exact_share(3, 3).low == pytest.approx(0.025 ** (1 / 3))
    # No event in 100 readings: exp(-rate) = 0.025.
    assert exp(-per_100(0, 100).high) == pytest.approx(0.025)
    assert per_100(0, 100).low == 0 and per_100(4, 200).rate == 2.0
    assert (per_100(4, 200).low, per_100(4, 200).high) == pytest.approx((1.090 / 2, 10.242 / 2), abs=1e-3)


@pytest.mark.parametrize(("area", "m", "n"), [(0.8, 5, 7), (0.5, 4, 4), (1.0, 5, 9), (0.0, 3, 6)])
def test_ends_of_an_auroc_interval_solve_newcombes_equation(area: float, m: int, n: int) -> None:
    low, high = auroc_interval(area, m, n)
    assert 0 <= low <= area <= high <= 1 and high - low > 0.1
    for end in {low, high} - {0.0, 1.0}:
        extra = (m + n) / 2 - 1
        variance = end * (1 - end) * (1 + extra * (1 - end) / (2 - end) + extra * end / (1 + end)) / (m * n)
        assert (area - end) ** 2 == pytest.approx(norm.ppf(0.975) ** 2 * variance, rel=1e-4)
    mirrored = auroc_interval(1 - area, m, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-6)
    wider, narrower = high - low, np.diff(auroc_interval(area, 10 * m, 10 * n))[0]
    assert narrower < wider


def test_a_series_follows_the_steps_from_the_base_on() -> None:
    frame = pd.DataFrame(
        {"run": ["a"] * 3, "step": [4, 0, 2], "feature": ["persona"] * 3, "shift": [4.0, 0.0, 2.0]},
    )
    assert {run: v.tolist() for run, v in series_of(frame, "persona").items()} == {"a": [0.0, 2.0, 4.0]}
    with pytest.raises(InputError, match="did you mean 'persona'"):
        series_of(frame, "persna")


def test_bad_input_says_what_to_change() -> None:
    with pytest.raises(InputError, match="at least two"):
        calibrate(peaks(1.0), HeldRule(1), 0.05)
    with pytest.raises(InputError, match="between 0 and 1"):
        calibrate(peaks(1.0, 2.0), HeldRule(1), 5)
    with pytest.raises(InputError, match="'100 readings'"):
        calibrate(peaks(1.0, 2.0), HeldRule(1), 0.05, "hour")
    with pytest.raises(InputError, match="fewer than 4 readings"):
        calibrate(peaks(1.0, 2.0), HeldRule(4), 0.05)
    with pytest.raises(InputError, match="does not vary on the base"):
        calibrate({"a": np.array([NAN]), "b": np.array([NAN])}, HeldRule(1), 0.05)
    with pytest.raises(InputError, match="held must be"):
        HeldRule(0)
    with pytest.raises(InputError, match="unknown side 'up'"):
        HeldRule(1, "up")
    with pytest.raises(InputError, match="no readings"):
        per_100(0, 0)
    with pytest.raises(InputError, match="no share"):
        exact_share(2, 1)
    with pytest.raises(InputError, match="no interval"):
        auroc_interval(0.5, 0, 3)
