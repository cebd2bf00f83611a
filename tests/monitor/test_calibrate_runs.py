"""`monitor calibrate`: benign arms over new seeds, for a located study; kept, resumed, and refused where they leak."""

import json
from pathlib import Path

import pytest
import yaml

from persona_probe.errors import InputError
from persona_probe.monitor.calibration import benign_readings, calibration_study
from persona_probe.study.study import Study
from tests.factories import refusal, run_command
from tests.monitor.labelled_study import located, located_values, make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def source(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return located(place, tmp_path_factory.mktemp("located") / "run")


def calibrate(config: Path, run: Path, *options: object) -> None:
    run_command("monitor", "calibrate", config, "--run", run, "--held", 1, "--side", "both", *options)


def test_thresholds_of_a_located_study(
    place: Path, source: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "study.yaml", tmp_path / "benign"
    config.write_text(yaml.safe_dump(located_values(place)))
    calibrate(config, source.path, "--out", out, "--seeds", 1, 2)
    record = json.loads((out / "calibration.json").read_text())
    assert record["steps"] == [1, 2]
    found = record["features"]["mean difference"]
    assert set(found["statistics"]) == {"correct-s1", "correct-s2"} and found["needed"] == 19
    assert found["threshold"] == max(found["statistics"].values())
    shown = capsys.readouterr().out
    assert "2 benign runs cannot promise 0.05" in shown
    assert "at most 78% of further runs will (exact, 95% confidence, on the same data set)" in shown
    # The made-up persona latent is silent on the probes, which must not cost the others their thresholds.
    assert record["features"]["persona"]["threshold"] is None
    assert "persona: no threshold: nothing was read that could be compared" in shown
    calibrate(out, source.path, "--out", out, "--seeds", 1, 2, "--per", "100-readings", "--rate", 20)
    counted = json.loads((out / "calibration.json").read_text())["features"]["mean difference"]
    assert (counted["unit"], counted["needed"], counted["supported"]) == ("100 readings", 5, True)
    # More seeds later: what is there stays, and only the new one is trained.
    kept = {p: p.stat().st_mtime_ns for p in (out / "arms").glob("*/*/*")}
    calibrate(config, source.path, "--out", out, "--seeds", 1, 2, 3)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    more = json.loads((out / "calibration.json").read_text())["features"]["mean difference"]["statistics"]
    assert len(more) == 3 and {run: more[run] for run in found["statistics"]} == found["statistics"]
    assert sorted(p.name for p in (out / "arms").iterdir()) == [f"correct-s{n}" for n in (1, 2, 3)]


def test_a_shift_is_from_the_base_and_zero_there(source: Study, tmp_path: Path) -> None:
    readings = benign_readings(source.context, calibration_study(source.context, tmp_path / "benign"), seeds=[1])
    start, later = readings[readings["step"] == 0], readings[readings["feature"] == "mean difference"]
    assert (start["shift"].dropna() == 0).all() and (later.loc[later["step"] > 0, "shift"] != 0).all()
    assert set(readings["run"]) == {"correct-s1"} and "persona" in set(readings["feature"])


def test_what_would_leak_is_refused(
    place: Path, source: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benign = calibration_study(source.context, tmp_path / "benign")
    with pytest.raises(InputError, match="seed 0 helped to choose the features"):
        benign_readings(source.context, benign, seeds=[0, 1])
    with pytest.raises(InputError, match="'incorrect' is not benign"):
        benign_readings(source.context, benign, seeds=[1], arms=["incorrect"])
    with pytest.raises(InputError, match="did you mean 'correct'"):
        benign_readings(source.context, benign, seeds=[1], arms=["corect"])
    with pytest.raises(InputError, match="located study itself"):
        calibration_study(source.context, source.path)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**located_values(place), "layer": 1}))
    refused = refusal(capsys)
    assert "run of another config" in refused("monitor", "calibrate", other, "--run", source.path)
    assert "is no run folder" in refused("monitor", "calibrate", tmp_path)


def test_an_unavailable_device_is_refused_before_the_folder_is_made(source: Study, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device 'mps:7' is not available"):
        calibration_study(source.context, tmp_path / "benign", device="mps:7")
    assert not (tmp_path / "benign").exists()
