"""Intervals with the seed's variance: they cover where an interval over questions does not."""

import numpy as np
import pandas as pd
import pytest

from persona_probe.evaluate.effects import SeedNoise, arm_effect, seed_noise

QUESTIONS = 60


def evals(runs: dict[tuple[str, int], np.ndarray]) -> pd.DataFrame:
    frames = [
        pd.DataFrame({"arm": arm, "seed": seed, "step": 0, "item": range(len(values)), "value": values})
        for (arm, seed), values in runs.items()
    ]
    return pd.concat(frames, ignore_index=True)


def test_a_null_pairs_squared_difference_is_twice_a_runs_variance() -> None:
    table = evals({("correct", 0): np.full(5, 0.3), ("incorrect", 0): np.ones(5)})
    null = evals({("null", 0): np.full(5, 0.1)})
    noise = seed_noise(table, "correct", null)
    assert noise is not None
    assert (noise.variance, noise.df, noise.source) == (pytest.approx(0.02), 1, "a null pair")
    assert seed_noise(table, "correct") is None


def test_several_seeds_are_pooled_over_arms() -> None:
    runs = {("correct", s): np.full(4, v) for s, v in enumerate((0.0, 0.2))}
    runs |= {("incorrect", s): np.full(4, v) for s, v in enumerate((1.0, 1.4))}
    noise = seed_noise(evals(runs), "correct")
    assert noise is not None
    assert (noise.variance, noise.df) == (pytest.approx((0.02 + 0.08) / 2), 2)


def test_the_interval_widens_and_never_narrows() -> None:
    rng = np.random.default_rng(0)
    table = evals({("incorrect", 0): rng.normal(1, 0.3, QUESTIONS), ("correct", 0): rng.normal(0, 0.3, QUESTIONS)})
    plain = arm_effect(table, "incorrect", "correct")
    wide = arm_effect(table, "incorrect", "correct", SeedNoise(0.01, 1, "a null pair"))
    same = arm_effect(table, "incorrect", "correct", SeedNoise(0.0, 1, "a null pair"))
    assert wide.estimate == plain.estimate
    assert wide.ci_high - wide.ci_low > 1.5 * (plain.ci_high - plain.ci_low)
    assert same.ci_low <= plain.ci_low
    assert same.ci_high >= plain.ci_high


@pytest.mark.long
def test_two_runs_on_the_same_data_are_covered() -> None:
    rng = np.random.default_rng(0)
    plain = covered = 0
    for _ in range(400):
        shifts, questions = rng.normal(0, 0.1, 3), rng.normal(0, 0.5, QUESTIONS)
        left, right, null = (questions + shift + rng.normal(0, 0.2, QUESTIONS) for shift in shifts)
        table = evals({("incorrect", 0): left, ("correct", 0): right})
        noise = seed_noise(table, "correct", evals({("null", 0): null}))
        plain += not arm_effect(table, "incorrect", "correct").excludes_zero
        covered += not arm_effect(table, "incorrect", "correct", noise).excludes_zero
    assert plain / 400 < 0.5
    assert covered / 400 > 0.85
