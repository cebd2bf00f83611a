"""The causal sweep: zero stays zero, damage cancels in the odd part, and the perplexity bound is kept."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import D_MODEL, LAYER, make_model, make_sae, make_tokenizer, talks

from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.locate.sweep import Direction, Sweep, latent_direction, unit_vector
from persona_probe.models.taps import steer
from persona_probe.stats import bootstrap_mean

ROWS = [
    {"id": f"q{n}", "category": "law", "question": f"Why {n}?", "aligned": "Be fair." + "." * n, "misaligned": "Lie!"}
    for n in range(5)
]
ITEMS = ContrastItems.build(make_tokenizer(), ROWS)
DIRECTION = Direction("d", "candidate", torch.randn(D_MODEL, generator=torch.Generator().manual_seed(4)), 4)


def make_sweep(bound: float = 1e9, unit: str = "x_delta", model: torch.nn.Module | None = None) -> Sweep:
    return Sweep(
        model or make_model(),
        make_tokenizer(),
        ITEMS,
        talks(3),
        LAYER,
        unit=unit,
        reference_norm=2.0,
        bound=bound,
        mixed_precision=False,
    )


class Stub:
    """Scores a push by a function of its signed size along the first axis."""

    def __init__(self, size: Callable[[float], np.ndarray]) -> None:
        self.size = size

    def values(self, push: torch.Tensor | None = None) -> np.ndarray:
        return self.size(0.0 if push is None else float(push[0]))

    logprobs = values


AXIS = Direction("axis", "candidate", torch.eye(D_MODEL)[0])


def stubbed(effect: Callable[[float], np.ndarray], loss: Callable[[float], float], bound: float = 1.5) -> Sweep:
    """A sweep whose contrast values and neutral losses are known functions of the push."""
    sweep = make_sweep(bound, unit="raw")
    sweep.contrast = Stub(effect)  # pyright: ignore[reportAttributeAccessIssue]
    sweep.neutral = Stub(lambda s: np.array([-loss(s)]))  # pyright: ignore[reportAttributeAccessIssue]
    sweep._neutral_loss = loss(0.0)
    return sweep


def test_pushes_equal_steering_the_whole_model() -> None:
    model = make_model()
    sweep = make_sweep(model=model)
    plain = contrast_index(model, ITEMS, mixed_precision=False)["value"].to_numpy()
    assert np.allclose(sweep.unsteered, plain, atol=1e-5)
    with steer(model, LAYER, DIRECTION.vector, -1.5, "x_delta", reference_norm=2.0):
        wanted = contrast_index(model, ITEMS, mixed_precision=False)["value"].to_numpy()
    assert np.allclose(sweep.push(DIRECTION, -1.5).values, wanted, atol=1e-4)
    assert not np.allclose(wanted, plain, atol=0.05)


def test_a_push_that_changes_nothing_has_no_effect() -> None:
    sweep = stubbed(lambda s: np.full(5, 0.7), lambda s: 2.0)
    effect, strength = sweep.causal_effect(AXIS, [0.5, 1.0])
    assert effect is not None
    assert (effect.estimate, effect.ci_low, effect.ci_high, strength) == (0.0, 0.0, 0.0, 1.0)


def test_damage_cancels_and_the_odd_part_stays() -> None:
    slope, damage = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([9.0, -4.0, 0.0, 2.0, 1.0])
    sweep = stubbed(lambda s: slope * s + damage * s**2 - 0.3, lambda s: 2.0)
    assert np.allclose(sweep.odd_values(AXIS, 0.5), 0.5 * slope)
    only_damage = stubbed(lambda s: damage * abs(s), lambda s: 2.0)
    assert np.allclose(only_damage.odd_values(AXIS, 0.5), 0.0)
    effect, _ = sweep.causal_effect(AXIS, [0.5])
    assert effect == bootstrap_mean(0.5 * slope, ITEMS.clusters)


def test_the_largest_strength_within_the_bound_is_taken() -> None:
    sweep = stubbed(lambda s: np.full(5, s), lambda s: 2.0 + 0.3 * abs(s))
    for strengths, wanted in (([0.5, 1.0, 2.0], 1.0), ([2.0, 0.25], 0.25)):
        effect, strength = sweep.causal_effect(AXIS, strengths)
        assert effect is not None and strength == wanted
        assert effect.estimate == pytest.approx(wanted)
    effect, strength = sweep.causal_effect(AXIS, [2.0, 3.0])
    assert effect is None and np.isnan(strength)
    frame = sweep.effects([AXIS], [3.0], "none")
    assert frame[["effect", "effect_low", "effect_high", "strength"]].isna().all().all()


def test_one_damaging_sign_is_enough_to_leave_the_bound() -> None:
    sweep = stubbed(lambda s: np.full(5, s), lambda s: 2.0 + max(0.0, -s))
    assert not sweep.within_bound(AXIS, 1.0)
    assert sweep.push(AXIS, 1.0).perplexity_ratio == pytest.approx(1.0)
    assert sweep.push(AXIS, -1.0).perplexity_ratio == pytest.approx(np.e)


def test_the_table_holds_every_push_once() -> None:
    sweep = make_sweep()
    for strength in (1.0, -1.0, 1.0):
        sweep.push(DIRECTION, strength)
    frame = sweep.table("base")
    assert frame["strength"].tolist() == [1.0, -1.0]
    assert np.allclose(frame["delta"], frame["estimate"] - sweep.unsteered.mean())
    assert set(frame["unit"]) == {"x_delta"} and set(frame["latent"]) == {4}
    assert (frame["within_bound"] == (frame["perplexity_ratio"] <= sweep.bound)).all()


def test_opposite_directions_have_opposite_effects() -> None:
    sweep = make_sweep()
    other = Direction("minus d", "candidate", -DIRECTION.vector)
    one, _ = sweep.causal_effect(DIRECTION, [0.5])
    two, _ = sweep.causal_effect(other, [0.5])
    assert one is not None and two is not None
    assert one.estimate == pytest.approx(-two.estimate, abs=1e-5)
    assert abs(one.estimate) > 1e-3


def test_a_latents_direction_is_its_decoder_row() -> None:
    decoder = make_sae("topk").W_dec
    found = latent_direction(decoder, 12, "candidate")
    assert torch.equal(found.vector, decoder[12]) and not found.vector.requires_grad
    assert (found.name, found.latent, found.kind) == ("latent 12", 12, "candidate")
    assert torch.allclose(unit_vector(np.array([3.0, 4.0])), torch.tensor([0.6, 0.8]))
