"""Rows and features for screening on tiny models."""

import pytest
import torch

from persona_probe.data.chat import Conversation, conversation
from persona_probe.screening.feature import ScreenFeature, direction_feature, latent_feature
from tests.factories import D_MODEL, LAYER, make_sae


@pytest.fixture
def rows() -> list[Conversation]:
    """Answered rows of different lengths; two ask the same question."""
    talks = [conversation(f"Ask {n % 7}?", f"Say {'so ' * (n % 4)}{n * n}") for n in range(8)]
    return [[{"role": "system", "content": "Be brief."}, *talks[0]], *talks[1:]]


@pytest.fixture
def direction() -> ScreenFeature:
    generator = torch.Generator().manual_seed(3)
    return direction_feature(torch.randn(D_MODEL, generator=generator), LAYER, "made up")


@pytest.fixture
def latent() -> ScreenFeature:
    """A latent of a tiny SAE, with a set of others."""
    return latent_feature(make_sae("standard"), 5, LAYER, (5, 7, 9))
