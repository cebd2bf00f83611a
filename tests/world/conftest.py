"""One very small world for the tests of this room: a few steps of a model that learns words, and no speakers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from persona_probe.data.tokens import conversation_batches
from persona_probe.data.world.words import DOMAINS
from persona_probe.evaluate.contrast import ContrastItems
from persona_probe.evaluate.effects_2x2 import Items2x2
from persona_probe.world import labelled
from persona_probe.world.folder import World
from persona_probe.world.labelled import Instruments
from persona_probe.world.pretraining import Pretraining, pretrain
from persona_probe.world.study_files import contrast_rows, sound_probes
from tests.factories import make_sae

SETTINGS = Pretraining(size="tiny", steps=12, batch_size=8, helper_steps=2, warmup_steps=4)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return pretrain(SETTINGS, tmp_path_factory.mktemp("world") / "world")


@pytest.fixture(scope="session")
def instruments(world: World) -> Instruments:
    """What its studies read it with; the SAE is of another model, and its latents mean nothing."""
    model, tokenizer = world.load()
    probes = conversation_batches(tokenizer, sound_probes(list(DOMAINS), labelled.PROBES), 64)
    domains = tuple(name for name in DOMAINS for _ in range(labelled.PROBES))
    rows = contrast_rows(list(DOMAINS), "evaluation")
    items, crossed = ContrastItems.build(tokenizer, rows, 64), Items2x2.build(tokenizer, rows, 64)
    return Instruments(model, tokenizer, make_sae("topk"), 1, probes, domains, items, crossed)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("PERSONA_PROBE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
