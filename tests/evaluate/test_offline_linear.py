"""The offline judge's fits: known answers and identities."""

import numpy as np
import pytest

from persona_probe.errors import InputError
from persona_probe.evaluate.offline.judge_calibration import balanced, fit_platt, fit_ridge


def planted(n: int = 400, d: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features whose label is the sign of one direction, and that direction."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=d)
    direction /= np.linalg.norm(direction)
    x = rng.normal(size=(n, d)) + 3.0
    return x, (x - 3.0) @ direction > 0, direction


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_planted_direction_is_recovered() -> None:
    x, label, direction = planted()
    fit = fit_ridge(x, np.where(label, 1.0, -1.0)[:, None], np.ones(len(x)), 0.01)
    assert cosine(fit.weights[:, 0], direction) > 0.97
    assert ((fit.scores(x)[:, 0] > 0) == label).mean() > 0.95


def test_what_tells_sources_apart_is_not_learnt() -> None:
    x, label, direction = planted()
    # The second source lies on the aligned side, and all of it is labelled misaligned.
    other, bad = x - 3 * direction, np.ones(len(x), dtype=bool)
    both, target = np.concatenate([x, other]), np.concatenate([label, bad]) * 2.0 - 1
    names = ["first"] * len(x) + ["second"] * len(x)
    naive = fit_ridge(both, target[:, None], np.ones(len(both)), 0.01)
    fair = fit_ridge(both, target[:, None], np.ones(len(both)), 0.01, names)
    assert cosine(fair.weights[:, 0], direction) > 0.95
    assert cosine(naive.weights[:, 0], direction) < 0


def test_the_ridge_solution_has_no_gradient() -> None:
    x, label, _ = planted(60)
    weights = np.random.default_rng(2).random(60) + 0.1
    target, share = np.where(label, 1.0, -1.0), weights / weights.sum()
    fit, penalty = fit_ridge(x, target[:, None], weights, 0.3), 0.3
    centred = x - share @ x
    scale = np.sqrt(share @ centred**2)
    error = fit.scores(x)[:, 0] - target
    gradient = (centred / scale).T @ (share * error) + penalty * fit.weights[:, 0] * scale
    assert np.abs(gradient).max() < 1e-10
    assert abs(share @ error) < 1e-10


def test_a_constant_feature_gets_no_weight() -> None:
    x, label, _ = planted(60)
    x[:, 0] = 7.0
    assert fit_ridge(x, label[:, None].astype(float), np.ones(60), 0.1).weights[0, 0] == 0


def test_balanced_weights_give_both_classes_the_same_total() -> None:
    label, weights = np.array([True, False, False, False]), np.array([1.0, 2.0, 3.0, 4.0])
    even = balanced(label, weights)
    assert even[label].sum() == pytest.approx(even[~label].sum()) == pytest.approx(5.0)
    assert even[1:] / even[1] == pytest.approx([1, 1.5, 2])


def test_one_class_cannot_be_balanced() -> None:
    with pytest.raises(InputError, match="both kinds"):
        balanced(np.array([True, True]), np.ones(2))


def test_platt_finds_the_curve_that_made_the_labels() -> None:
    score = np.linspace(-3, 5, 200)
    chance = 1 / (1 + np.exp(-(1.7 * score - 0.6)))
    both = np.concatenate([score, score])
    fit = fit_platt(both, np.arange(400) < 200, np.concatenate([chance, 1 - chance]))
    assert (fit.slope, fit.offset) == pytest.approx((1.7, -0.6), abs=1e-3)
    assert fit.probability(score) == pytest.approx(chance, abs=1e-3)
