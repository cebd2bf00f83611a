from pathlib import Path

import pytest

from persona_probe.latents import passages
from tests.factories import Refused, config_of, refusal, write_config, write_data, write_model, write_sae

PACKAGED = passages.PACKAGED
"""As imported: tests shorten it only when they run."""


@pytest.fixture(scope="session", autouse=True)
def whole_card_text(short_card_text: None) -> None:
    """Workers that Ray starts do not know of the tests' shorter text, so here all processes read the packaged one."""
    passages.PACKAGED = PACKAGED


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, SAE, data files and config of the tiny study; read only."""
    folder = tmp_path_factory.mktemp("tiny-study")
    write_model(folder / "model")
    write_sae(folder / "sae")
    write_data(folder)
    write_config(folder / "study.yaml", config_of(folder))
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    return refusal(capsys)
