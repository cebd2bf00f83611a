"""Carriers: decoder rows leave nothing over, orthogonal directions everything, random ones are not carried."""

import numpy as np
import pytest
from scipy.stats import beta

from persona_probe.errors import InputError
from persona_probe.latents.unexplained import Reference, carriers, pursue, random_reference, unit_rows

D_SAE, D_MODEL = 384, 96


def dictionary(seed: int = 0) -> np.ndarray:
    """Random unit rows, float32 as SAEs have them."""
    rows = np.random.default_rng(seed).normal(size=(D_SAE, D_MODEL)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return random_reference(dictionary(), 4)


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_a_decoder_row_is_explained_by_itself(scale: float) -> None:
    decoder = dictionary() * np.linspace(0.1, 9, D_SAE, dtype=np.float32)[:, None]
    found = carriers(decoder, scale * decoder[37], k=1)
    assert found.latents == (37,)
    assert (found.cosines[0], found.best_cosine) == pytest.approx((1.0, 1.0), abs=1e-6)
    assert found.unexplained == pytest.approx(0.0, abs=1e-6)
    assert found.one_latent and found.carried and "latent 37 carries 100% of this" in str(found)


def test_a_direction_orthogonal_to_all_rows_is_wholly_unexplained() -> None:
    decoder = dictionary()
    decoder[:, -1] = 0
    found = carriers(decoder, np.eye(D_MODEL)[-1], k=4)
    assert (found.latents, found.unexplained, found.best_cosine) == ((), 1.0, 0.0)
    assert not found.carried
    assert str(found).startswith("no latent carries this: best cosine 0.00")
    assert "unexplained by 4 latents 100%" in str(found)


def test_an_orthonormal_dictionary_leaves_all_but_the_largest_positive_parts() -> None:
    direction = np.array([3.0, -5.0, 2.0, 1.0, -1.0, 0.0])
    for k, taken in ((1, [0]), (2, [0, 2]), (3, [0, 2, 3]), (5, [0, 2, 3])):
        found = carriers(np.eye(6), direction, k)
        assert list(found.latents) == taken
        assert found.unexplained == pytest.approx(1 - (direction[taken] ** 2).sum() / 40)
    found = carriers(np.eye(6), direction, 2, signed=True)
    assert found.latents == (1, 0) and found.best_cosine == pytest.approx(-5 / 40**0.5)
    assert found.unexplained == pytest.approx(6 / 40)


def test_a_latent_that_falls_is_carried_only_where_signs_are_allowed() -> None:
    decoder = dictionary()
    assert not carriers(decoder, -decoder[5], 4).one_latent
    found = carriers(decoder, -decoder[5], 4, signed=True)
    assert found.one_latent and found.latents[0] == 5 and found.best_cosine == pytest.approx(-1.0, abs=1e-6)


def test_several_latents_carry_a_sum_that_none_carries_alone(reference: Reference) -> None:
    decoder, planted = dictionary(), [3, 50, 111, 200]
    found = carriers(decoder, decoder[planted].sum(axis=0), 4, margin=0.2, reference=reference)
    assert set(found.latents) == set(planted)
    assert found.unexplained == pytest.approx(0.0, abs=1e-6)
    assert found.few_latents and not found.one_latent
    assert "4 latents carry 100% of this" in str(found)


def test_coefficients_are_refitted_and_not_negative() -> None:
    """Correlated rows: the first pick alone is wrong, the refit finds both; a negative part cannot be taken."""
    decoder = np.array([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    assert carriers(decoder, 2 * decoder[0] + decoder[1], 2).unexplained == pytest.approx(0.0, abs=1e-12)
    difference = decoder[0] - 0.5 * decoder[1] - decoder[2]
    left = carriers(decoder, difference, 3).unexplained
    assert left == pytest.approx(1 - difference[0] ** 2 / (difference @ difference))
    assert carriers(decoder, difference, 3, signed=True).unexplained == pytest.approx(0.0, abs=1e-12)


def test_random_directions_are_seldom_carried(reference: Reference) -> None:
    noise = np.random.default_rng(99).normal(size=(200, D_MODEL))
    found = [carriers(dictionary(), direction, 4, reference=reference) for direction in noise]
    assert not any(f.carried for f in found)
    inside = [reference.cosine.ci_low <= f.best_cosine <= reference.cosine.ci_high for f in found]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.05)
    beyond = [f.best_cosine > reference.cosine.extreme for f in found]
    assert np.mean(beyond) <= 0.04


def test_the_reference_matches_the_distribution_of_the_largest_of_independent_cosines(reference: Reference) -> None:
    """A cosine's square is Beta(1/2, (d - 1) / 2) distributed; the largest of n is below m half the time."""
    tail = 1 - 0.5 ** (1 / D_SAE)
    median = beta.isf(2 * tail, 0.5, (D_MODEL - 1) / 2) ** 0.5
    assert reference.cosine.median == pytest.approx(median, rel=0.03)
    assert reference.cosine.ci_low < reference.cosine.median < reference.cosine.ci_high < reference.cosine.extreme
    assert reference.unexplained.extreme < reference.unexplained.ci_low < reference.unexplained.median
    assert random_reference(dictionary(), 4) == reference
    assert random_reference(dictionary(), 4, seed=1) != reference


def test_noise_lowers_the_verdict_by_degrees(reference: Reference) -> None:
    decoder, rng = dictionary(), np.random.default_rng(3)
    noise = rng.normal(size=D_MODEL)
    noise /= np.linalg.norm(noise)
    found = [carriers(decoder, decoder[8] + size * noise, 4, reference=reference) for size in (0, 0.5, 1, 8)]
    assert [f.carried for f in found] == [True, True, True, False]
    assert np.all(np.diff([f.unexplained for f in found]) > 0)


def test_pursuit_does_not_depend_on_its_company_and_skips_zero_rows() -> None:
    decoder = dictionary()
    decoder[:5] = 0
    rows = unit_rows(decoder, 4)
    assert not rows[:5].any()
    targets = np.random.default_rng(1).normal(size=(70, D_MODEL))
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    picked, best, left = pursue(rows, targets, 4, False)
    assert min(min(p) for p in picked) >= 5 and all(len(set(p)) == 4 for p in picked)
    alone = pursue(rows, targets[66:67], 4, False)
    assert alone[0][0] == picked[66]
    assert (alone[1][0], alone[2][0]) == pytest.approx((best[66], left[66]), abs=1e-6)


def test_bad_input_says_what_to_change(reference: Reference) -> None:
    decoder = dictionary()
    with pytest.raises(InputError, match="direction has shape"):
        carriers(decoder, np.ones(3))
    with pytest.raises(InputError, match="zero or not finite"):
        carriers(decoder, np.zeros(D_MODEL))
    for k in (0, D_SAE + 1):
        with pytest.raises(InputError, match=f"use 1 to {D_SAE}"):
            carriers(decoder, decoder[0], k)
    with pytest.raises(InputError, match="make one with k=2"):
        carriers(decoder, decoder[0], 2, reference=reference)
    with pytest.raises(InputError, match="at least 100"):
        random_reference(decoder, 2, n_random=99)
    with pytest.raises(InputError, match="rows that are not finite"):
        carriers(decoder * np.inf, decoder[0], 2)
