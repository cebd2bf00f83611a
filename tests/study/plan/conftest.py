"""A tiny model, its tokenizer and its SAE in one folder, and a study of them."""

from pathlib import Path

import pytest

from persona_probe.config import StudyConfig, Training
from tests.factories import make_model, make_sae, make_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and an SAE of its layer 1; read only."""
    folder = tmp_path_factory.mktemp("dry-run")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_sae("topk").save_model(str(folder / "sae"))
    return folder


@pytest.fixture
def local(place: Path) -> StudyConfig:
    """A study of the tiny model on packaged data (whose texts are long in bytes)."""
    training = Training(steps=3, batch_size=4, checkpoints=(1,), max_length=4096)
    return StudyConfig("local", str(place / "sae"), str(place / "model"), training=training, device="cpu")
