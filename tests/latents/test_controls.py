"""Control latents: never a candidate, matched in firing rate, the same for the same seed."""

import numpy as np
import pandas as pd
import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.latents.causal import matched_latents, random_directions


@pytest.fixture
def table() -> pd.DataFrame:
    """500 latents; the first hundred moved most, rates fall from 1 to 0.002 over the rest, the last ten are dead."""
    latent = np.arange(500)
    rise = np.where(latent < 100, np.where(latent % 2, -9.0, 9.0), 0.01)
    rate = np.where(latent < 490, 1 / (1 + latent), 0.0)
    return pd.DataFrame({"latent": latent, "rise": rise, "firing_incorrect": rate}).sample(frac=1, random_state=0)


CHOSEN = [120, 480]


def test_controls_are_no_candidates_nor_moved_nor_dead(table: pd.DataFrame) -> None:
    drawn = matched_latents(table, CHOSEN, 30, seed=0)
    assert len(set(drawn)) == 30
    assert not set(drawn) & set(CHOSEN)
    assert all(100 <= latent < 490 for latent in drawn)


def test_controls_are_matched_in_firing_rate(table: pd.DataFrame) -> None:
    drawn = matched_latents(table, CHOSEN, 10, seed=0)
    assert all(abs(latent - 120) <= 20 for latent in drawn[0::2])
    assert all(abs(latent - 480) <= 20 for latent in drawn[1::2])


def test_seeds_decide(table: pd.DataFrame) -> None:
    drawn = matched_latents(table, CHOSEN, 8, seed=0)
    assert matched_latents(table, CHOSEN, 8, seed=0) == drawn
    assert matched_latents(table.sample(frac=1, random_state=1), CHOSEN, 8, seed=0) == drawn
    assert matched_latents(table, CHOSEN, 8, seed=1) != drawn


def test_a_small_dictionary_still_never_gives_candidates(table: pd.DataFrame) -> None:
    small = table[table["latent"] < 20]
    assert not set(matched_latents(small, [0, 1], 18, seed=0)) & {0, 1}
    with pytest.raises(InputError, match="only 18 latents for 19 random controls"):
        matched_latents(small, [0, 1], 19, seed=0)


def test_random_directions_are_unit_and_seeded() -> None:
    rows = torch.stack(random_directions(64, 5, seed=0))
    assert torch.allclose(rows.norm(dim=1), torch.ones(5), atol=1e-6)
    cosines = rows @ rows.T - torch.eye(5)
    assert float(cosines.abs().max()) < 0.6
    assert torch.equal(rows, torch.stack(random_directions(64, 5, seed=0)))
    assert not torch.equal(rows, torch.stack(random_directions(64, 5, seed=1)))
