"""Random latents: never a candidate, over all firing rates, equal on all machines; and what the best of them reach."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.latents.causal import BestOf, moved_latents, random_directions, random_latents

RECORD = Path(__file__).parents[2] / "records" / "demo" / "latents.parquet"
CHOSEN = [120, 480]


@pytest.fixture
def firing() -> pd.Series:
    """500 latents: rates fall from 1 to 0.002, the last ten are dead."""
    latent = np.arange(500)
    return pd.Series(np.where(latent < 490, 1 / (1 + latent), 0.0), index=latent).sample(frac=1, random_state=0)


def test_random_latents_are_no_candidates_and_alive(firing: pd.Series) -> None:
    drawn = random_latents(firing, CHOSEN, 64, seed=0)
    assert len(set(drawn)) == 64
    assert not set(drawn) & set(CHOSEN)
    assert max(drawn) < 490
    assert drawn == random_latents(firing.sample(frac=1, random_state=1), CHOSEN, 64, seed=0)
    assert drawn != random_latents(firing, CHOSEN, 64, seed=1)


def test_they_are_spread_over_firing_rates(firing: pd.Series) -> None:
    for seed in range(20):
        counts = np.bincount([latent // 123 for latent in random_latents(firing, CHOSEN, 64, seed)], minlength=4)
        assert counts.min() >= 4
        assert counts.max() <= 25


def test_rounding_on_another_machine_does_not_change_the_demos_draw() -> None:
    table = pd.read_parquet(RECORD).set_index("latent")
    candidates = [int(str(i)) for i in table.index[table["kind"] == "candidate"]]
    firing = table[["firing_base", "firing_incorrect", "firing_correct"]].max(axis=1)
    drawn = random_latents(firing, candidates, 64, seed=0)
    for seed in range(100):
        jitter = 1 + np.random.default_rng(seed).uniform(-0.005, 0.005, len(firing))
        assert random_latents(firing * jitter, candidates, 64, seed=0) == drawn


def test_a_small_dictionary_still_never_gives_candidates(firing: pd.Series) -> None:
    small = firing[firing.index < 20]
    assert not set(random_latents(small, [0, 1], 18, seed=0)) & {0, 1}
    with pytest.raises(InputError, match="only 18 latents for 19 random controls"):
        random_latents(small, [0, 1], 19, seed=0)


def test_moved_latents_are_the_largest_changes_in_either_direction() -> None:
    rise = pd.Series({0: 9.0, 1: -8.0, 2: 0.1, 3: 5.0, 4: -0.2})
    assert moved_latents(rise, [0], 2) == [1, 3]


def test_the_best_of_three_is_what_all_sets_of_three_give() -> None:
    rng = np.random.default_rng(0)
    selection, evaluation = rng.normal(size=9), rng.normal(size=9)
    best = BestOf.of(selection.tolist(), evaluation.tolist(), 3)
    reached = []
    for members in combinations(range(9), 3):
        chosen = max(members, key=lambda i: abs(selection[i]))
        reached.append(evaluation[chosen] * np.sign(selection[chosen]))
    assert best.weights.sum() == pytest.approx(1)
    for value in (-0.5, 0.0, 0.3, 1.0):
        assert best.p(value) == pytest.approx(np.mean(np.asarray(reached) >= value))
    assert best.limit() == pytest.approx(np.quantile(reached, 0.95, method="inverted_cdf"))


def test_a_candidate_that_is_a_random_latent_is_seldom_beyond_the_limit() -> None:
    rng = np.random.default_rng(0)
    beyond = 0
    for _ in range(1000):
        truth = rng.normal(0, 0.05, 70)
        selection, evaluation = (truth + rng.normal(0, 0.02, 70) for _ in range(2))
        persona = int(np.argmax(selection[:6]))
        limit = BestOf.of(selection[6:].tolist(), evaluation[6:].tolist(), 6).limit()
        beyond += evaluation[persona] - 1.96 * 0.02 > limit
    assert 0 < beyond / 1000 <= 0.05


def test_random_directions_are_unit_and_seeded() -> None:
    rows = torch.stack(random_directions(64, 5, seed=0))
    assert torch.allclose(rows.norm(dim=1), torch.ones(5), atol=1e-6)
    cosines = rows @ rows.T - torch.eye(5)
    assert float(cosines.abs().max()) < 0.6
    assert torch.equal(rows, torch.stack(random_directions(64, 5, seed=0)))
    assert not torch.equal(rows, torch.stack(random_directions(64, 5, seed=1)))
