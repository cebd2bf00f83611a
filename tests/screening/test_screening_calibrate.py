"""The predicted shift: known lines come back, and there is no number where there is no ground for one."""

import json

import numpy as np
import pandas as pd
import pytest

from benchmarks.screening import measured_shifts
from persona_probe.errors import InputError
from persona_probe.evaluate.shift import ScoredRun, calibrate
from persona_probe.screening import prediction as packaged
from persona_probe.screening.feature import ScreenFeature
from persona_probe.screening.prediction import packaged_calibration, pairs_of, predict_for, predict_shift, valid_for
from persona_probe.screening.reading import ScreenSettings
from tests.factories import make_model


def line(n: int = 6, noise: float = 0.0) -> list[ScoredRun]:
    """Shift = 2 x score - 1, and alternating noise."""
    return [ScoredRun(f"set {i}", 0, float(i), 2.0 * i - 1 + noise * (-1) ** i) for i in range(n)]


def test_an_exact_line_is_found_and_predicts_without_error() -> None:
    found = calibrate(line())
    assert (found.slope, found.intercept) == pytest.approx((2, -1))
    assert found.error == pytest.approx(0, abs=1e-9) and found.left_out == pytest.approx(0, abs=1e-9)
    shift = predict_shift(found, 2.5)
    assert (shift.estimate, shift.low, shift.high) == pytest.approx((4, 4, 4))


def test_seeds_of_one_data_set_are_one_point() -> None:
    pairs = [ScoredRun(p.data, seed, p.score, p.shift + delta) for p in line() for seed, delta in ((0, -0.3), (1, 0.3))]
    doubled, single = calibrate(pairs), calibrate(line())
    assert doubled.interval(2.0) == pytest.approx(single.interval(2.0))
    with pytest.raises(InputError, match="4 data sets: a calibration needs at least 5"):
        calibrate([ScoredRun(p.data, seed, p.score, p.shift) for p in line(4) for seed in range(3)])


def test_the_interval_is_that_of_the_textbook() -> None:
    """Five points, residuals known: s^2 = SSE / 3, t(0.975, 3) = 3.1824."""
    x, y = np.arange(5.0), np.array([0.0, 1.5, 1.5, 3.5, 3.5])
    found = calibrate([ScoredRun(str(i), 0, float(a), float(b)) for i, (a, b) in enumerate(zip(x, y, strict=True))])
    slope, intercept = np.polyfit(x, y, 1)
    s = np.sqrt(np.square(y - slope * x - intercept).sum() / 3)
    half = 3.18244630528 * s * np.sqrt(1 + 1 / 5 + (3.0 - 2) ** 2 / 10)
    assert found.interval(3.0) == pytest.approx(
        (intercept + 3 * slope, intercept + 3 * slope - half, intercept + 3 * slope + half)
    )
    left = [y[i] - np.polyval(np.polyfit(np.delete(x, i), np.delete(y, i), 1), x[i]) for i in range(5)]
    assert found.left_out == pytest.approx(np.sqrt(np.mean(np.square(left))))
    mean = [y[i] - np.delete(y, i).mean() for i in range(5)]
    assert found.baseline == pytest.approx(np.sqrt(np.mean(np.square(mean))))


@pytest.mark.parametrize("score", [-0.1, 5.1, float("nan")])
def test_outside_the_range_there_is_no_number(score: float) -> None:
    shift = predict_shift(calibrate(line(noise=0.1)), score)
    assert (shift.estimate, shift.low, shift.high) == (None, None, None)
    assert "outside the calibrated range 0 to 5" in shift.statement


def test_without_ground_there_is_no_number() -> None:
    assert predict_shift(None, 1.0).estimate is None
    assert "no calibration for this model and feature" in predict_shift(None, 1.0).statement
    assert "needs the ranker" in predict_for(calibrate(line()), {"latent": np.ones(3)}).statement
    rows = np.array([2.0, np.nan, 3.0])
    assert predict_for(calibrate(line()), {"projection_difference": rows}).estimate == pytest.approx(4)


def test_pairs_without_a_line_are_refused() -> None:
    with pytest.raises(InputError, match="same score"):
        calibrate([ScoredRun(str(i), 0, 1.0, float(i)) for i in range(5)])
    with pytest.raises(InputError, match="all data sets but one"):
        calibrate([ScoredRun(str(i), 0, float(i == 0), float(i)) for i in range(5)])
    with pytest.raises(InputError, match="not finite"):
        calibrate([*line(5), ScoredRun("x", 0, float("nan"), 0.0)])


def test_the_packaged_calibration_is_for_its_own_model_and_feature(
    latent: ScreenFeature, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = make_model(), ScreenSettings()
    monkeypatch.setattr(packaged.resources, "files", lambda _: tmp_path)
    assert packaged_calibration(latent, model, settings) is None  # no file
    pairs = [
        {"data": p.data, "seed": 0, "score": {"projection_difference": p.score, "latent": 0.0}, "shift": p.shift}
        for p in line()
    ]
    held = {
        "valid_for": valid_for(latent, model, settings),
        "provenance": {"study": "made up", "training": "2 steps"},
        "pairs": pairs,
    }
    (tmp_path / packaged.FILE).write_text(json.dumps(held))
    found = packaged_calibration(latent, model, settings)
    assert found is not None and found.slope == pytest.approx(2)
    assert "6 runs, made up, 2 steps" in found.statement
    assert packaged_calibration(latent, make_model(seed=1), settings) is None
    assert packaged_calibration(latent, model, ScreenSettings(own_tokens=7)) is None


def test_the_calibration_that_ships_has_its_provenance_and_beats_the_mean() -> None:
    held = json.loads((packaged.resources.files("persona_probe.data") / packaged.FILE).read_text())
    found = calibrate(pairs_of(held))
    assert len(found.sets) >= 5 and found.left_out < found.baseline
    assert held["provenance"]["config_hash"] and {"toxic", "subtle", "correct", "health"} <= set(found.sets)


def test_a_run_s_shift_is_its_last_step_minus_the_base() -> None:
    values = {0: (1.0, 3.0), 4: (9.0, 9.0), 24: (2.0, 5.0)}
    evals = pd.DataFrame(
        [{"run": "a-s1", "item": i, "step": step, "value": v} for step, of in values.items() for i, v in enumerate(of)]
    )
    assert measured_shifts(evals) == {"a-s1": 1.5}
