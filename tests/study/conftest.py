from pathlib import Path

import pytest

from persona_probe.study.study import Study
from tests.factories import Refused, Row, config_of, refusal, write_config, write_data, write_model, write_sae
from tests.made_once import made_once, own_copy


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, SAE, data files and config of the tiny study; read only."""

    def make(folder: Path) -> None:
        write_model(folder / "model")
        write_sae(folder / "sae")
        write_data(folder)
        write_config(folder / "study.yaml", config_of(folder))

    return made_once(tmp_path_factory, "tiny-study", make)


@pytest.fixture(scope="session")
def raw(place: Path) -> Row:
    """The tiny study's config as plain values."""
    return config_of(place)


@pytest.fixture(scope="session")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The tiny study after the whole loop; read only."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BROWSER_PATH", "/nowhere")  # a browser would draw the SVGs: slow, and tests/report does it
            Study.from_yaml(place / "study.yaml", folder / "run").run()

    return own_copy(tmp_path_factory, made_once(tmp_path_factory, "finished", make) / "run")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    return refusal(capsys)
