"""Intervals and AUROC on known answers."""

import numpy as np
import pytest

from persona_probe.errors import InputError
from persona_probe.stats import auroc, bootstrap_mean, bootstrap_statistic, paired_difference

VALUES = np.random.default_rng(0).normal(size=40)


def test_a_constant_has_a_point_interval() -> None:
    found = bootstrap_mean([2.5] * 7)
    assert (found.estimate, found.ci_low, found.ci_high, found.n) == (2.5, 2.5, 2.5, 7)
    assert found.excludes_zero and not bootstrap_mean([0.0] * 7).excludes_zero


def test_the_interval_has_the_textbook_width() -> None:
    values = np.random.default_rng(1).normal(size=400)
    found = bootstrap_mean(values, n_boot=4000)
    standard_error = values.std() / 20
    assert found.ci_high - found.ci_low == pytest.approx(2 * 1.96 * standard_error, rel=0.07)
    narrow = bootstrap_mean(values, n_boot=4000, level=0.5)
    assert narrow.ci_high - narrow.ci_low == pytest.approx(2 * 0.674 * standard_error, rel=0.1)


def test_items_said_twice_are_no_more_evidence() -> None:
    twice, names = np.repeat(VALUES, 2), [n for n in range(40) for _ in range(2)]
    plain, naive, clustered = bootstrap_mean(VALUES), bootstrap_mean(twice), bootstrap_mean(twice, names)
    assert clustered.ci_high - clustered.ci_low > 1.2 * (naive.ci_high - naive.ci_low)
    assert (clustered.ci_low, clustered.ci_high) == pytest.approx((plain.ci_low, plain.ci_high))


def test_seeds_decide() -> None:
    assert bootstrap_mean(VALUES, seed=3) == bootstrap_mean(VALUES, seed=3)
    assert bootstrap_mean(VALUES, seed=3) != bootstrap_mean(VALUES, seed=4)


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(InputError, match="no values"):
        bootstrap_mean([])
    with pytest.raises(InputError, match="2 of 3 values are not finite"):
        bootstrap_mean([1.0, float("nan"), float("inf")])
    with pytest.raises(InputError, match="3 values but 2 cluster names"):
        bootstrap_mean([1.0, 2.0, 3.0], ["a", "b"])
    with pytest.raises(InputError, match="no values"):
        bootstrap_statistic([], np.median)  # pyright: ignore[reportArgumentType]


def test_paired_difference_of_a_side_with_itself_is_exactly_zero() -> None:
    found = paired_difference(VALUES, VALUES)
    assert (found.estimate, found.ci_low, found.ci_high) == (0.0, 0.0, 0.0)
    shifted = paired_difference(VALUES + 1, VALUES)
    assert (shifted.estimate, shifted.ci_low, shifted.ci_high) == pytest.approx((1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="differ in length: 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_pairing_is_tighter_than_the_spread_between_items() -> None:
    noise = np.random.default_rng(5).normal(size=40)
    paired = paired_difference(10 * VALUES + 0.1 * noise, 10 * VALUES)
    assert paired.ci_high - paired.ci_low < 0.1


def test_a_statistic_is_what_it_says() -> None:
    found = bootstrap_statistic([1.0, 2.0, 9.0], lambda v: float(np.median(v)))
    assert found.estimate == 2.0 and (found.ci_low, found.ci_high) == (1.0, 9.0)


def test_auroc_known_answers() -> None:
    assert auroc([3, 4], [1, 2]) == 1.0
    assert auroc([1, 2], [3, 4]) == 0.0
    assert auroc([5, 5], [5, 5, 5]) == 0.5
    assert auroc([1, 3], [2]) == 0.5
    assert auroc([2, 3], [1, 2]) == pytest.approx(3.5 / 4)
    with pytest.raises(InputError, match="both classes"):
        auroc([], [1.0])
