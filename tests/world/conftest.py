"""One very small world for the tests of this room: a few steps of a model that learns words, and no speakers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from persona_probe.world.folder import World
from persona_probe.world.pretraining import Pretraining, pretrain

SETTINGS = Pretraining(size="tiny", steps=12, batch_size=8, helper_steps=2, warmup_steps=4)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return pretrain(SETTINGS, tmp_path_factory.mktemp("world") / "world")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PERSONA_PROBE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
