from pathlib import Path

import pytest

from persona_probe.study.study import Study
from tests.factories import Refused, changed, config_of, refusal, write_config, write_data, write_model, write_sae
from tests.made_once import made_once, own_copy


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, SAE, data files and config of a tiny study with one seed and one corrective arm; read only."""

    def make(folder: Path) -> None:
        write_model(folder / "model")
        write_sae(folder / "sae")
        write_data(folder)
        raw = changed(config_of(folder), seeds=[0], locate={"candidates": 1, "proven": 1, "cards": 1})
        raw["realign"] = {**raw["realign"], "arms": {"realigned_in": {"data": str(folder / "holdout.jsonl")}}}
        write_config(folder / "study.yaml", raw)

    return made_once(tmp_path_factory, "realign-study", make)


@pytest.fixture(scope="session")
def tracked(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The tiny study up to its corrective arm; tests only add to its `realign` folder, under names of their own."""

    def make(folder: Path) -> None:
        Study.from_yaml(place / "study.yaml", folder / "run").induce().locate().track().realign()

    return own_copy(tmp_path_factory, made_once(tmp_path_factory, "tracked", make) / "run")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    return refusal(capsys)
