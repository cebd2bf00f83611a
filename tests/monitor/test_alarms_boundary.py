"""A fitted boundary finds what was planted, survives JSON, and refuses what it cannot use."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.monitor.rules.boundary import COLUMNS, Boundary
from tests.monitor.alarm_readings import NAN, alarm_steps, feature, reading


def planted(n: int = 400, noise: float = 0.0) -> tuple[pd.DataFrame, np.ndarray]:
    """Readings that are bad where shift + 10 x explained variance is over 9."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"shift": rng.normal(2, 1.5, n), "explained_variance": rng.uniform(0.5, 0.9, n)})
    score = frame["shift"] + 10 * frame["explained_variance"] + noise * rng.normal(size=n)
    return frame.assign(feature="persona", mode="probe", run=np.arange(n) % 4), (score > 9).to_numpy()


def test_a_planted_threshold_is_found() -> None:
    shifts = np.linspace(-1, 5, 601)
    frame = pd.DataFrame({"shift": shifts})
    boundary = Boundary.fit(frame, (shifts > 1.3).tolist(), strength=1e-6)
    assert boundary.cut == pytest.approx(1.3, abs=0.02)
    assert boundary.probability(feature(boundary.cut), reading(0, 0)) == pytest.approx(0.5)
    assert alarm_steps(boundary, [0, 1.2, 1.4, 1.5, 0.5, 1.4]) == [2, 5]
    assert alarm_steps(Boundary.fit(frame, shifts > 1.3, strength=1e-6, k=2), [0, 1.4, 1.5]) == [2]
    assert Boundary.fit(frame, shifts > 1.3, threshold=0.99).cut > boundary.cut


def test_a_planted_line_in_two_columns_is_found() -> None:
    frame, bad = planted()
    boundary = Boundary.fit(frame, bad, columns=("shift", "explained_variance"), strength=1e-6)
    slope, bias = boundary.weights[1] / boundary.weights[0], -boundary.bias / boundary.weights[0]
    assert (slope, bias) == pytest.approx((10, 9), rel=0.03)
    assert math.isnan(boundary.cut)
    assert boundary.update(reading(0, 2.0, ev=0.65)) is None
    alarm = boundary.update(reading(1, 2.0, ev=0.75))
    assert alarm is not None and alarm.value > alarm.threshold == 0.5
    assert "(shift 2, explained_variance 0.75)" in alarm.message


def test_the_fit_maximises_the_likelihood() -> None:
    frame, bad = planted(noise=2.0)
    boundary = Boundary.fit(frame, bad, strength=1e-9)
    x, w, b = frame["shift"].to_numpy(), boundary.weights[0], boundary.bias
    wrong = bad - 1 / (1 + np.exp(-(w * x + b)))
    assert (wrong.mean(), (wrong * x).mean()) == pytest.approx((0, 0), abs=1e-5)


def test_it_survives_json(tmp_path: Path) -> None:
    frame, bad = planted()
    settings = {"threshold": 0.8, "k": 3, "name": "two", "mode": "probe", "feature": "persona"}
    boundary = Boundary.fit(frame, bad, columns=("shift", "explained_variance"), **settings)
    path = boundary.save(tmp_path / "boundary.json")
    again = Boundary.load(path)
    for name in ("columns", "weights", "bias", "fitted_on", *settings):
        assert getattr(again, name) == getattr(boundary, name)
    assert again.k == 3 and again.describe() == boundary.describe()
    assert all(
        again.probability(feature(s), reading(0, s)) == boundary.probability(feature(s), reading(0, s)) for s in (0, 2)
    )


def test_labels_may_be_by_run() -> None:
    frame, _ = planted()
    by_run, by_row = {0: True, 1: False, 2: True, 3: False}, (np.arange(400) % 2 == 0).tolist()
    assert Boundary.fit(frame, by_run).weights == Boundary.fit(frame, by_row).weights
    assert Boundary.fit(frame, pd.Series(by_row)).weights == Boundary.fit(frame, by_row).weights
    with pytest.raises(InputError, match="unknown run without a label 3"):
        Boundary.fit(frame, {0: True, 1: False, 2: True})
    with pytest.raises(InputError, match="need a column `run`"):
        Boundary.fit(frame.drop(columns="run"), by_run)


def test_only_the_rows_of_the_feature_are_fitted(caplog: pytest.LogCaptureFixture) -> None:
    frame, bad = planted()
    noise = frame.assign(feature="random latent", shift=0.0)
    both, labels = pd.concat([frame, noise]), np.concatenate([bad, ~bad])
    plain = Boundary.fit(frame, bad)
    chosen = Boundary.fit(both, labels, feature="persona")
    assert chosen.weights == plain.weights and chosen.feature == "persona"
    assert Boundary.fit(both, labels).weights != plain.weights
    gaps = frame.assign(shift=frame["shift"].where(frame.index > 9))
    assert Boundary.fit(gaps, bad).weights == Boundary.fit(frame[10:], bad[10:]).weights
    assert "10 of 400 readings have a NaN" in caplog.text


def test_a_missing_column_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    boundary = Boundary(("loss",), (1.0,), 0.0)
    assert boundary.update(reading(0, 9)) is None
    assert "one of its columns (loss) is NaN" in caplog.text
    assert math.isnan(Boundary(("shift",), (1.0,), 0.0).probability(feature(NAN), reading(0, NAN)))


def test_every_column_is_one_of_a_readings_rows() -> None:
    assert set(COLUMNS) <= set(reading(0, 1).rows()[0])


def test_bad_input_says_what_to_change(tmp_path: Path) -> None:
    frame, bad = planted(40)
    with pytest.raises(InputError, match="did you mean 'shift'"):
        Boundary.fit(frame, bad, columns=("shfit",))
    with pytest.raises(InputError, match="unknown column of these readings 'l0'"):
        Boundary.fit(frame, bad, columns=("l0",))
    with pytest.raises(InputError, match="40 readings but 39 labels"):
        Boundary.fit(frame, bad[1:])
    with pytest.raises(InputError, match="of both kinds"):
        Boundary.fit(frame, np.ones(40, dtype=bool))
    with pytest.raises(InputError, match="labels must be true"):
        Boundary.fit(frame, ["bad"] * 40)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="did you mean 'persona'"):
        Boundary.fit(frame, bad, feature="personna")
    with pytest.raises(InputError, match="threshold must be a probability"):
        Boundary(("shift",), (1.0,), 0.0, threshold=1.0)
    with pytest.raises(InputError, match="1 columns but 2 weights"):
        Boundary(("shift",), (1.0, 2.0), 0.0)
    with pytest.raises(InputError, match="at least one column"):
        Boundary((), (), 0.0)
    with pytest.raises(InputError, match="must be finite"):
        Boundary(("shift",), (NAN,), 0.0)


@pytest.mark.parametrize("text", ["{", "[]", '{"columns": ["shift"]}', '{"_memory": {}}', '{"colums": []}'])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "boundary.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"boundary\.json"):
        Boundary.load(path)
    with pytest.raises(InputError, match="cannot read a boundary"):
        Boundary.load(tmp_path / "none.json")
    Boundary(("shift",), (1.0,), 0.0).save(path)
    assert json.loads(path.read_text())["weights"] == [1.0]
