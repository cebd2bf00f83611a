"""Intervals, tests and AUROC on known answers."""

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp
from sklearn.metrics import roc_auc_score

from persona_probe.errors import InputError
from persona_probe.stats import (
    Estimate,
    auroc,
    auroc_columns,
    benjamini_hochberg,
    bootstrap_columns,
    bootstrap_mean,
    bootstrap_statistic,
    clopper_pearson,
    clustered_p_values,
    estimate_text,
    exact_share,
    grouped_size,
    number_text,
    paired_difference,
)

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


def test_few_clusters_get_the_t_interval_on_their_means() -> None:
    values = np.random.default_rng(11).normal(0.3, size=(8, 5))
    questions = np.repeat(np.arange(8), 5).tolist()
    wanted = ttest_1samp(values.mean(axis=1), 0).confidence_interval(0.95)
    found = bootstrap_mean(values.ravel(), questions)
    assert (found.ci_low, found.ci_high) == pytest.approx((wanted.low, wanted.high))
    low, high = bootstrap_columns(values.reshape(40, 1), questions)
    assert (low[0], high[0]) == pytest.approx((wanted.low, wanted.high))
    alone = bootstrap_mean([1.0, 3.0], ["a", "a"])  # one cluster: no interval, and no claim
    assert alone.estimate == 2 and np.isnan(alone.ci_low) and not alone.excludes_zero


def test_a_rate_without_spread_has_the_exact_interval_of_as_many_answers_as_count() -> None:
    questions = np.repeat(np.arange(8), 9).tolist()
    assert grouped_size([9] * 8) == 72 / 5  # 1 + 8 * 0.5
    assert (grouped_size([1] * 8), grouped_size([9] * 8, 0), grouped_size([9] * 8, 1)) == (8, 72, 8)
    assert grouped_size([30, 2]) < grouped_size([16, 16])  # most of the evidence is from one question
    for value in (0.0, 1.0):
        found = bootstrap_mean([value] * 72, questions, rate=True)
        assert (found.ci_low, found.ci_high) == pytest.approx(clopper_pearson(14.4 * value, 14.4))
    alone = bootstrap_mean([0.0] * 8, rate=True)
    wanted = binomtest(0, 8).proportion_ci(method="exact")
    assert (alone.ci_low, alone.ci_high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    near = bootstrap_mean([0.0, 0.0, 0.0, 1.0], rate=True)
    assert (near.ci_low, near.ci_high) == (0.0, 1.0)  # t would leave the range


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
    assert np.isnan(auroc([1.0, float("nan")], [0.0]))


def test_auroc_is_sklearns_with_ties_and_with_weights() -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        scores, positive, weights = rng.integers(0, 9, 50), rng.random(50) < 0.4, rng.random(50)
        order = np.concatenate([np.flatnonzero(positive), np.flatnonzero(~positive)])
        left, right = scores[positive], scores[~positive]
        assert auroc(left, right) == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
        weighted = roc_auc_score(positive, scores, sample_weight=weights)
        assert auroc(left, right, weights[order]) == pytest.approx(weighted, abs=1e-12)
    with pytest.raises(InputError, match="weight on both"):
        auroc([1.0], [2.0], [1.0, 0.0])


def test_auroc_of_columns_is_exactly_that_of_each_column() -> None:
    rng = np.random.default_rng(8)
    values, positive = rng.integers(0, 5, (40, 30)).astype(float), rng.random(40) < 0.5
    alone = [auroc(column[positive], column[~positive]) for column in values.T]
    assert auroc_columns(values, positive).tolist() == alone
    with pytest.raises(InputError, match="both classes"):
        auroc_columns(values, np.ones(40, dtype=bool))


def test_the_exact_share_of_a_count_is_scipys_interval() -> None:
    for count, n in ((0, 5), (3, 4), (7, 7), (20, 61)):
        wanted = binomtest(count, n).proportion_ci(method="exact")
        found = exact_share(count, n)
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
        assert str(found) == f"{count} of {n}" and found.rate == count / n
    with pytest.raises(InputError, match="no share: 5 of 4 runs"):
        exact_share(5, 4)


QUESTIONS = [n // 3 for n in range(60)]


def test_columns_get_the_intervals_that_they_would_get_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=(60, 7))
    low, high = bootstrap_columns(values, QUESTIONS, n_boot=4000)
    for column, (a, b) in enumerate(zip(low, high, strict=True)):
        alone = bootstrap_mean(values[:, column], QUESTIONS, n_boot=4000)
        assert (a, b) == pytest.approx((alone.ci_low, alone.ci_high), abs=0.03)
    monkeypatch.setattr("persona_probe.stats._COLUMNS_AT_ONCE", 2)
    assert np.allclose(bootstrap_columns(values, QUESTIONS, n_boot=4000), [low, high])


def test_clusters_of_one_size_give_the_t_test_on_their_means() -> None:
    values = np.random.default_rng(3).normal(0.2, size=(60, 5))
    order = np.random.default_rng(4).permutation(60)
    _, wanted = ttest_1samp(values.reshape(20, 3, 5).mean(axis=1), 0)
    found = clustered_p_values(values[order], [QUESTIONS[i] for i in order])
    assert found == pytest.approx(wanted)
    assert clustered_p_values(values) == pytest.approx(ttest_1samp(values, 0)[1])


def test_items_said_twice_leave_p_as_it_was() -> None:
    names = [n for n in range(40) for _ in range(2)]
    twice = clustered_p_values(np.repeat(VALUES, 2)[:, None], names)
    assert twice == pytest.approx(clustered_p_values(VALUES[:, None]))


def test_p_at_the_edges() -> None:
    flat = np.array([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert clustered_p_values(flat).tolist() == [1.0, 0.0]
    assert clustered_p_values(flat, ["a"] * 3).tolist() == [1.0, 1.0]
    with pytest.raises(InputError, match="no values"):
        clustered_p_values(np.zeros((0, 2)))
    with pytest.raises(InputError, match="3 values but 1 cluster"):
        bootstrap_columns(flat, ["a"])


def test_benjamini_hochberg_by_hand() -> None:
    # Ranked 0.01, 0.02, 0.03, 0.5 of 4: 0.04, 0.04, 0.04, 0.5. In the second, 0.06 x 3 / 2 = 0.09 > 0.08 after it.
    assert benjamini_hochberg([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.04, 0.5, 0.04, 0.04])
    assert benjamini_hochberg([0.08, 0.001, 0.06]) == pytest.approx([0.08, 0.003, 0.08])
    assert benjamini_hochberg([0.9]).tolist() == [0.9] and benjamini_hochberg([]).size == 0
    for bad in ([0.5, float("nan")], [-0.1, 0.2], [1.5]):
        with pytest.raises(InputError, match="p-values are not between 0 and 1"):
            benjamini_hochberg(bad)


def test_false_discoveries_stay_below_the_level() -> None:
    """Sparse, skewed, clustered values, as latents have: 180 columns without an effect and 20 with one."""
    rng, wrong, found = np.random.default_rng(6), [], []
    for _ in range(60):
        fires = rng.random((2, 20, 1, 200)) < 0.4
        arms = (fires * rng.exponential(size=(2, 20, 1, 200)) + 0.1 * rng.random((2, 20, 3, 200))).reshape(2, 60, 200)
        arms[0, :, :20] += 1.2
        q = benjamini_hochberg(clustered_p_values(arms[0] - arms[1], QUESTIONS))
        hits = q <= 0.05
        wrong.append(hits[20:].sum() / max(hits.sum(), 1))
        found.append(hits[:20].mean())
    assert np.mean(wrong) <= 0.055
    assert np.mean(found) > 0.8


def test_numbers_as_text() -> None:
    assert number_text(0.1234, ".2f") == "0.12" and number_text(None, ".2f") == number_text(float("nan"), ".2f") == "-"
    assert estimate_text(0.31, 0.22, 0.4) == "+0.310 [+0.220, +0.400]" == str(Estimate(0.31, 0.22, 0.4, 9))
    assert estimate_text(0.31, 0.22, 0.4, ".0%") == "31% [22%, 40%]" and estimate_text(None, 0.0, 0.0) == "-"
    nan = float("nan")
    assert estimate_text(0.31, nan, nan) == estimate_text(0.31, None, None) == "+0.310 (one question: no interval)"
