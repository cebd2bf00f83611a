from pathlib import Path

import pytest

from persona_probe.study.study import Study
from tests.factories import Refused, changed, config_of, refusal, write_config, write_data, write_model, write_sae


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, SAE, data files and config of a tiny study with one seed and one corrective arm; read only."""
    folder = tmp_path_factory.mktemp("realign-study")
    write_model(folder / "model")
    write_sae(folder / "sae")
    write_data(folder)
    raw = changed(config_of(folder), seeds=[0], locate={"candidates": 1, "proven": 1, "cards": 1})
    raw["realign"] = {**raw["realign"], "arms": {"realigned_in": {"data": str(folder / "holdout.jsonl")}}}
    write_config(folder / "study.yaml", raw)
    return folder


@pytest.fixture(scope="session")
def tracked(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The tiny study up to its corrective arm; tests only add to its `realign` folder, under names of their own."""
    study = Study.from_yaml(place / "study.yaml", tmp_path_factory.mktemp("tracked") / "run")
    return study.induce().locate().track().realign()


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    return refusal(capsys)
