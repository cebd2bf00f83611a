"""Agreement figures, intervals and scope of the offline judge, against hand-made cases."""

import numpy as np
import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.evaluate.offline.features import fit_scope
from persona_probe.evaluate.offline.judge_calibration import (
    RateError,
    average_precision,
    calibration_error,
    conformal_quantile,
    fit_bands,
    rates,
    reliability,
    weighted_auroc,
    weighted_quantiles,
)
from persona_probe.stats import auroc


def test_auroc_with_equal_weights_is_the_usual_one() -> None:
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 6, 80).astype(float), rng.random(80) > 0.6
    assert weighted_auroc(score, label, np.ones(80)) == pytest.approx(auroc(score[label], score[~label]))


def test_whole_weights_count_as_repeated_answers() -> None:
    rng = np.random.default_rng(1)
    score, label, weights = rng.random(30), rng.random(30) > 0.5, rng.integers(1, 4, 30)
    for figure in (weighted_auroc, average_precision):
        many, labels = np.repeat(score, weights), np.repeat(label, weights)
        assert figure(score, label, weights.astype(float)) == pytest.approx(
            figure(many, labels, np.ones(weights.sum())), abs=0.02
        )


def test_average_precision_by_hand() -> None:
    found = average_precision(np.array([4.0, 3.0, 2.0, 1.0]), np.array([True, False, True, False]), np.ones(4))
    assert found == pytest.approx((1 + 2 / 3) / 2)


def test_auroc_needs_both_classes() -> None:
    with pytest.raises(InputError, match="both classes"):
        weighted_auroc(np.ones(3), np.ones(3, dtype=bool), np.ones(3))


def test_a_calibrated_judge_has_no_calibration_error() -> None:
    probability = np.repeat([0.1, 0.9], 100)
    label = np.concatenate([np.arange(100) < 10, np.arange(100) < 90])
    assert calibration_error(reliability(probability, label, np.ones(200), bins=2)) == pytest.approx(0.0)
    assert calibration_error(reliability(probability, ~label, np.ones(200), bins=2)) == pytest.approx(0.8)


def test_rates_of_a_sample_stand_for_all_answers() -> None:
    frame = pd.DataFrame({"model": ["a", "a", "b"], "misaligned": [True, False, False], "weight": [1.0, 3.0, 2.0]})
    found = rates(frame, np.array([0.5, 0.1, 0.2]), ["model"]).set_index("model")
    assert found.loc["a", "published"] == 0.25
    assert found.loc["a", "predicted"] == pytest.approx(0.2)
    assert found.loc["b", "predicted"] == pytest.approx(0.2)


def test_weighted_quantiles() -> None:
    values, weights = np.array([30.0, 10.0, 20.0]), np.array([1.0, 2.0, 1.0])
    assert weighted_quantiles(values, weights, [0.5, 0.51, 1.0]) == [10, 20, 30]


def test_bands_hold_the_share_that_they_promise_in_every_part() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.random(4000) * 100
    published = np.clip(predicted + rng.normal(size=4000) * (1 + predicted / 5), 0, 100)
    low, high = fit_bands(predicted, published, np.ones(4000)).interval(predicted)
    inside = (low <= published) & (published <= high)
    for part in range(5):
        here = (predicted >= 20 * part) & (predicted < 20 * part + 20)
        assert inside[here].mean() >= 0.88
    assert low.min() >= 0
    assert high.max() <= 100


def test_the_conformal_quantile_is_an_order_statistic() -> None:
    assert conformal_quantile([-0.3, 0.1, 0.2], level=0.5) == 0.2
    assert conformal_quantile([0.01 * k for k in range(1, 100)], level=0.95) == pytest.approx(0.95)
    assert conformal_quantile([0.1, 0.4]) == 0.4


def test_more_questions_narrow_a_rate_no_further_than_the_models_own_error() -> None:
    error = RateError(overall=0.05, question=0.2)
    assert [error.half_width(n) for n in (1, 4, 100)] == pytest.approx([0.2, 0.1, 0.05])


def test_a_question_far_from_the_fitted_ones_is_out_of_scope() -> None:
    rng = np.random.default_rng(0)
    fitted, background = np.eye(8)[:3] * 4, rng.normal(size=(300, 8))
    scope = fit_scope(fitted, ("a", "b", "c"), ["a", "b", "c"], background, 8, 0.5)
    near, which = scope.nearest(np.stack([fitted[1] * 1.5, -fitted[1]]))
    assert near[0] > 0.95
    assert which[0] == 1
    assert near[1] < scope.threshold < near[0]


def test_the_threshold_keeps_topics_apart() -> None:
    background = np.random.default_rng(0).normal(size=(300, 8))
    fitted = np.stack([np.eye(8)[0], np.eye(8)[0] + 0.5 * np.eye(8)[1]])
    apart = fit_scope(fitted, ("a", "b"), ["a", "b"], background, 8, 0.01)
    assert apart.threshold == pytest.approx(float(apart.questions[0] @ apart.questions[1]))
    same = fit_scope(fitted, ("a", "a2"), ["a", "a"], background, 8, 0.01)
    assert same.threshold < apart.threshold


def test_too_small_a_background_is_refused() -> None:
    with pytest.raises(InputError, match="background"):
        fit_scope(np.eye(4), ("a",) * 4, ["a"] * 4, np.eye(4), 8, 0.9)
