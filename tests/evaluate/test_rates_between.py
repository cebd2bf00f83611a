"""Differences between arms, agreement between judges, and how many samples an interval takes."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr, ttest_1samp
from sklearn.metrics import cohen_kappa_score

from persona_probe.errors import InputError
from persona_probe.evaluate.agreement import (
    Components,
    agreement,
    agreements,
    half_width,
    kappa_over_questions,
    rank_correlation,
    samples_needed,
    variance_components,
)
from persona_probe.evaluate.rates import Cells, difference, share
from tests.evaluate.judged_rows import drawn, judged

SPREAD = [0.05, 0.9, 0.3, 0.6, 0.5, 0.8, 0.2, 0.4]


def both(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([left, right], ignore_index=True)


def test_an_arm_minus_itself_is_zero() -> None:
    values = drawn(SPREAD, 20, seed=0)
    found = difference(both(judged("incorrect", values), judged("correct", values)), "incorrect", "correct")
    assert (found.estimate, found.ci_low, found.ci_high, found.method, found.n) == (0, 0, 0, "t", 8)


def test_pairing_by_question_takes_the_questions_own_spread_out() -> None:
    left, right = drawn(SPREAD, 40, seed=1), drawn([max(0.0, r - 0.05) for r in SPREAD], 40, seed=2)
    frame = both(judged("incorrect", left), judged("correct", right))
    found = difference(frame, "incorrect", "correct")
    means = [np.mean([v for q in side.values() for v in q if v is not None]) for side in (left, right)]
    assert found.estimate == pytest.approx(means[0] - means[1])
    assert found.ci_low is not None and found.ci_high is not None
    per_question = [np.mean(np.array(left[q]) - np.array(right[q])) for q in left]
    wanted = ttest_1samp(per_question, 0).confidence_interval(0.95)  # equally many answers: t on the questions' means
    assert (found.ci_low, found.ci_high) == pytest.approx((wanted.low, wanted.high)) and found.method == "t"


def test_only_shared_questions_count_whatever_their_order() -> None:
    left = judged("incorrect", {"x": [1.0] * 9, "a": [1.0, 0.0], "b": [1.0, 1.0]})
    right = judged("correct", {"b": [0.0, 0.0], "a": [0.0, 0.0], "y": [1.0] * 9})
    found = difference(both(left, right), "incorrect", "correct")
    assert (found.estimate, found.n, found.method) == (0.75, 2, "exact")


def test_no_misaligned_answer_on_one_side_leaves_an_interval() -> None:
    left = judged("incorrect", drawn([0.5] * 8, 20, seed=3))
    right = judged("correct", {f"q{n:02d}": [0.0] * 20 for n in range(8)})
    found = difference(both(left, right), "correct", "correct")
    assert found.estimate == 0 and found.ci_low is not None and found.ci_low < 0
    found = difference(both(left, right), "incorrect", "correct")
    assert found.method == "exact" and found.ci_low is not None and found.estimate is not None
    assert 0.1 < found.ci_low < found.estimate


def test_a_difference_with_what_was_not_judged_is_not_judged() -> None:
    frame = both(judged("incorrect", {"a": [1.0]}), judged("correct", {"a": [0.0]}, why="no reply"))
    found = difference(frame, "incorrect", "correct")
    assert (found.judged, found.why, found.as_estimate()) == (False, "correct: no reply", None)
    with pytest.raises(InputError, match="unknown judged arm 'corect'"):
        difference(frame, "incorrect", "corect")


def test_seeds_of_both_arms_are_drawn_together() -> None:
    """Seeds that differ alike in both arms leave the paired difference as it is."""
    parts = [
        judged(arm, {f"q{n}": [float(seed)] * 10 + [float(arm == "incorrect")] * 10 for n in range(8)}, seed=seed)
        for arm in ("incorrect", "correct")
        for seed in (0, 1)
    ]
    found = difference(pd.concat(parts, ignore_index=True), "incorrect", "correct")
    assert (found.estimate, found.ci_low, found.ci_high) == pytest.approx((0.5, 0.5, 0.5))


def test_kappa_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    left = rng.random(300) < 0.3
    right = np.where(rng.random(300) < 0.8, left, rng.random(300) < 0.3)
    first, second = [
        judged("m", {f"q{n}": side[n::10].astype(float).tolist() for n in range(10)}) for side in (left, right)
    ]
    found = agreement(first, second)
    assert found.kappa is not None and found.kappa.estimate == pytest.approx(cohen_kappa_score(left, right))
    always = judged("m", {f"q{n}": [1.0] * 3 for n in range(10)})
    assert agreement(always, always).kappa is None  # expected agreement is 1


def test_kappas_interval_holds_the_truth_with_eight_questions() -> None:
    """The percentile bootstrap over eight questions holds it 89 times in 100."""
    rng, hits, trials = np.random.default_rng(0), 0, 200

    def two_judges(questions: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
        own, turned = rng.beta(1, 3, questions), rng.beta(2, 12, questions)
        first = rng.random((questions, samples)) < own[:, None]
        return first.ravel(), (first ^ (rng.random(first.shape) < turned[:, None])).ravel()

    truth = cohen_kappa_score(*two_judges(20000, 10))
    names = np.repeat(np.arange(8), 25).tolist()
    for _ in range(trials):
        found = kappa_over_questions(*two_judges(8, 25), names, 100, 0)
        assert found is not None
        hits += found.ci_low <= truth <= found.ci_high
    assert 0.91 <= hits / trials <= 0.985
    one = kappa_over_questions(np.array([True, False]), np.array([True, False]), ["a", "a"], 100, 0)
    assert one is not None and str(one) == "+1.000 (one question: no interval)"


def models(evaluation: str, flip: float) -> pd.DataFrame:
    """Four models of rising rates; `flip` of a judge's verdicts are turned round."""
    rng, parts = np.random.default_rng(1), []
    for place, rate in enumerate((0.1, 0.3, 0.6, 0.9)):
        values = drawn([rate] * 8, 10, seed=place)
        turned = {
            q: [None if v is None else abs(v - float(rng.random() < flip)) for v in vs] for q, vs in values.items()
        }
        parts.append(judged(f"m{place}", turned, evaluation=evaluation))
    return pd.concat(parts, ignore_index=True)


def test_judges_that_say_the_same_agree_and_others_less() -> None:
    same = agreement(models("a", 0), models("b", 0))
    assert same.kappa is not None and (same.kappa.estimate, same.agree) == (1, 1)
    assert (same.rate_correlation, same.answers, same.models) == (pytest.approx(1), 320, 4)
    noisy = agreement(models("a", 0), models("c", 0.15))
    marks = [models(name, flip)["value"] >= 0.5 for name, flip in (("a", 0), ("c", 0.15))]
    assert noisy.kappa is not None and noisy.kappa.estimate == pytest.approx(cohen_kappa_score(*marks))
    assert noisy.kappa.ci_low < noisy.kappa.estimate < noisy.kappa.ci_high
    assert noisy.agree == pytest.approx((marks[0] == marks[1]).mean())
    assert noisy.rate_correlation == pytest.approx(1)
    assert "a and c: kappa" in str(noisy)


def test_only_evaluations_of_the_same_answers_are_compared() -> None:
    frame = pd.concat([models("a", 0), models("b", 0), models("c", 0).assign(sampling="other")], ignore_index=True)
    assert [(a.left, a.right) for a in agreements(frame)] == [("a", "b")]
    with pytest.raises(InputError, match="no answer in common"):
        agreement(models("a", 0), models("c", 0).assign(questions="others"))


def test_rank_correlation_needs_ranks() -> None:
    left, right = pd.Series([1.0, 2.0, 4.0, 3.0]), pd.Series([0.1, 0.3, 0.2, 0.4])
    assert rank_correlation(left, right) == pytest.approx(spearmanr(left, right)[0])
    assert rank_correlation(left[:2], right[:2]) is None
    assert rank_correlation(left, pd.Series([1.0] * 4)) is None


def test_components_are_those_that_made_the_answers() -> None:
    rng = np.random.default_rng(0)
    question_rates = rng.beta(2, 2, size=1500)  # variance 0.05 between questions, 0.2 within
    found = variance_components(judged("incorrect", drawn(list(question_rates), 10, seed=1)))
    assert (found.between, found.within) == pytest.approx((0.05, 0.2), rel=0.15)
    assert found.intraclass == pytest.approx(0.2, rel=0.2) and (found.questions, found.counted) == (1500, 1)
    half: dict[str, list[float | None]] = {f"q{n}": [0.0, 1.0, None, None] for n in range(5)}
    assert variance_components(judged("incorrect", half)).counted == 0.5
    with pytest.raises(InputError, match="two questions, two answers each"):
        variance_components(judged("incorrect", {"a": [1.0], "b": [0.0]}))


@pytest.mark.parametrize("counted", [1.0, 0.5])
def test_so_many_samples_give_the_wanted_half_width(counted: float) -> None:
    found = samples_needed(Components(0.02, 0.18, 40, counted), 0.06)
    assert found.samples is not None
    components = Components(0.02, 0.18, 40, counted)
    assert half_width(components, 40, found.samples) <= 0.06 < half_width(components, 40, found.samples - 1)


def test_power_is_what_a_simulation_shows() -> None:
    """Rates of repeated studies, questions drawn anew each time, spread as far as was asked for."""
    between, within = 2 * 6 / (8**2 * 9), 0.25 * 0.75 - 2 * 6 / (8**2 * 9)  # of beta(2, 6)
    wanted = samples_needed(Components(between, within, 40), 0.06)
    assert wanted.samples is not None and wanted.samples > 1
    rng = np.random.default_rng(0)
    rates = rng.beta(2, 6, size=(6000, 40))
    means = rng.binomial(wanted.samples, rates).mean(axis=1) / wanted.samples
    assert 1.96 * means.std() == pytest.approx(
        half_width(Components(between, within, 40), 40, wanted.samples), rel=0.04
    )
    assert 1.96 * means.std() <= 0.06 * 1.03


@pytest.mark.parametrize("questions, samples", [(8, 25), (8, 50), (20, 10)])
def test_with_few_questions_power_is_the_width_of_the_rates_intervals(questions: int, samples: int) -> None:
    between, within = 0.24 / 6, 0.24 * 5 / 6  # of beta(2, 3)
    rng, names = np.random.default_rng(0), np.repeat(np.arange(questions), samples).tolist()
    widths = []
    for _ in range(100):
        values = rng.random(len(names)) < np.repeat(rng.beta(2, 3, questions), samples)
        found = share(Cells.of(values.astype(float).tolist(), names, [0] * len(names)))
        assert found is not None
        widths.append((found.ci_high - found.ci_low) / 2)
    planned = half_width(Components(between, within, questions), questions, samples)
    assert np.mean(widths) == pytest.approx(planned, rel=0.08)
    assert planned > 1.05 * 1.96 * np.sqrt((between + within / samples) / questions)  # the normal's promises too much


def test_the_number_of_questions_that_is_too_few_is_found_with_its_own_quantile() -> None:
    few = samples_needed(Components(0.05, 0.2, 8), 0.1)
    assert few.samples is None and few.least_questions == 21  # 2.080 sqrt(0.05 / 21) is 0.101; the normal's would be 19
    assert samples_needed(Components(0.05, 0.2, 8), 0.1, questions=21).samples is None
    assert samples_needed(Components(0.05, 0.2, 8), 0.1, questions=22).samples is not None
    assert samples_needed(Components(0.0, 0.2, 8), 0.1, questions=1).samples is None


def test_too_few_questions_are_never_enough() -> None:
    components = Components(0.05, 0.2, 10)
    found = samples_needed(components, 0.05)
    assert found.samples is None and found.least_questions == int(0.05 * (1.959964 / 0.05) ** 2)
    assert "out of reach: it takes more than 76 questions" in str(found)
    enough = samples_needed(components, 0.05, questions=found.least_questions + 1)
    assert enough.samples is not None
    with pytest.raises(InputError, match="above 0"):
        samples_needed(components, 0.0)
