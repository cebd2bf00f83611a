"""Causal effects: zero stays zero, damage cancels in the odd part, the perplexity bound is kept, sets grow greedily."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from persona_probe.evaluate.contrast import contrast_index
from persona_probe.latents.causal import (
    Direction,
    Sweep,
    ablations,
    bearable,
    effects,
    greedy_sets,
    joint,
)
from persona_probe.models.taps import ablate
from persona_probe.stats import Estimate, bootstrap_mean
from tests.factories import D_MODEL, LAYER, make_model
from tests.latents.sweeps import DIRECTION, ITEMS, ROWS, make_sweep


class Stub:
    """Scores a push by a function of its signed size along the first axis."""

    def __init__(self, size: Callable[[float], np.ndarray]) -> None:
        self.size = size

    def values(self, push: torch.Tensor | None = None) -> np.ndarray:
        return self.size(0.0 if push is None else float(push[0]))

    def values_many(self, pushes: torch.Tensor) -> np.ndarray:
        return np.stack([self.values(push) for push in pushes])

    logprobs, logprobs_many = values, values_many


class Linear(Stub):
    """Scores a push by its component along a known direction."""

    def __init__(self, gain: torch.Tensor) -> None:
        self.gain = gain

    def values(self, push: torch.Tensor | None = None) -> np.ndarray:
        return np.full(5, 0.0 if push is None else float(push @ self.gain))

    def values_many(self, pushes: torch.Tensor) -> np.ndarray:
        return np.stack([self.values(push) for push in pushes])

    def logprobs_many(self, pushes: torch.Tensor) -> np.ndarray:
        return np.zeros((len(pushes), 1))


AXIS = Direction("axis", "candidate", torch.eye(D_MODEL)[0])


def stubbed(effect: Callable[[float], np.ndarray], loss: Callable[[float], float], bound: float = 1.5) -> Sweep:
    """A sweep whose contrast values and neutral losses are known functions of the push."""
    sweep = make_sweep(bound, unit="raw")
    sweep.contrast = Stub(effect)  # pyright: ignore[reportAttributeAccessIssue]
    sweep.neutral = Stub(lambda s: np.array([-loss(s)]))  # pyright: ignore[reportAttributeAccessIssue]
    sweep._neutral_loss = loss(0.0)
    return sweep


def one_effect(sweep: Sweep, direction: Direction, strengths: list[float]) -> tuple[Estimate, float]:
    row = effects(sweep, [direction], strengths, "one").iloc[0]
    return Estimate(row["effect"], row["effect_low"], row["effect_high"], len(ROWS)), row["strength"]


def test_a_push_that_changes_nothing_has_no_effect() -> None:
    sweep = stubbed(lambda s: np.full(5, 0.7), lambda s: 2.0)
    effect, strength = one_effect(sweep, AXIS, [0.5, 1.0])
    assert (effect.estimate, effect.ci_low, effect.ci_high, strength) == (0.0, 0.0, 0.0, 1.0)


def test_damage_cancels_and_the_odd_part_stays() -> None:
    slope, damage = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([9.0, -4.0, 0.0, 2.0, 1.0])
    sweep = stubbed(lambda s: slope * s + damage * s**2 - 0.3, lambda s: 2.0)
    assert np.allclose(sweep.odd_values(AXIS, 0.5), 0.5 * slope)
    only_damage = stubbed(lambda s: damage * abs(s), lambda s: 2.0)
    assert np.allclose(only_damage.odd_values(AXIS, 0.5), 0.0)
    effect, _ = one_effect(sweep, AXIS, [0.5])
    assert effect == bootstrap_mean(0.5 * slope, ITEMS.clusters)


def test_the_largest_strength_within_the_bound_is_taken() -> None:
    sweep = stubbed(lambda s: np.full(5, s), lambda s: 2.0 + 0.3 * abs(s))
    for strengths, wanted in (([0.5, 1.0, 2.0], 1.0), ([2.0, 0.25], 0.25)):
        effect, strength = one_effect(sweep, AXIS, strengths)
        assert strength == wanted
        assert effect.estimate == pytest.approx(wanted)
    effect, strength = one_effect(sweep, AXIS, [2.0, 3.0])
    assert np.isnan(effect.estimate) and np.isnan(strength)
    frame = effects(sweep, [AXIS], [3.0], "none")
    assert frame[["effect", "effect_low", "effect_high", "strength"]].isna().all().all()


def test_one_damaging_sign_is_enough_to_leave_the_bound() -> None:
    sweep = stubbed(lambda s: np.full(5, s), lambda s: 2.0 + max(0.0, -s))
    assert sweep.within_bound([AXIS], 1.0) == [False]
    assert sweep.push(AXIS, 1.0).perplexity_ratio == pytest.approx(1.0)
    assert sweep.push(AXIS, -1.0).perplexity_ratio == pytest.approx(np.e)


def test_opposite_directions_have_opposite_effects() -> None:
    sweep = make_sweep()
    other = Direction("minus d", "candidate", -DIRECTION.vector)
    one, _ = one_effect(sweep, DIRECTION, [0.5])
    two, _ = one_effect(sweep, other, [0.5])
    assert one.estimate == pytest.approx(-two.estimate, abs=1e-5)
    assert abs(one.estimate) > 1e-3


def test_bisection_finds_the_strength_that_the_bound_allows() -> None:
    sweep = stubbed(lambda s: np.full(5, s), lambda s: 2.0 + 0.3 * abs(s))
    exact = float(np.log(1.5) / 0.3)  # perplexity ratio exp(0.3 s) = 1.5
    coarse = bearable(sweep, [AXIS], [0.5, 1.0, 2.0])["axis"]
    fine = bearable(sweep, [AXIS], [0.5, 1.0, 2.0], refine=8)["axis"]
    assert coarse == 1.0 and fine <= exact and fine == pytest.approx(exact, rel=0.01)
    assert bearable(sweep, [AXIS], [0.5, 1.0], refine=8)["axis"] == 1.0  # nothing above the grid is tried


def test_projecting_out_equals_the_ablate_tap() -> None:
    model = make_model()
    sweep = make_sweep(model=model)
    with ablate(model, LAYER, DIRECTION.vector):
        gone = contrast_index(model, ITEMS, bf16=False)["value"].to_numpy()
    assert np.allclose(sweep.ablate([DIRECTION]), gone, atol=1e-4)
    assert not np.allclose(gone, sweep.unsteered, atol=1e-3)
    other = Direction("e", "candidate", torch.eye(D_MODEL)[1], 7)
    frame = ablations(sweep, [[DIRECTION], [DIRECTION, other]])
    assert frame["name"].tolist() == ["d", "set 4 + 7"]
    assert frame["ablation"][0] == pytest.approx((sweep.unsteered - gone).mean(), abs=1e-4)


def test_sets_grow_by_the_latent_that_adds_most() -> None:
    gain = torch.tensor([3.0, 2.0, 1.0] + [0.0] * (D_MODEL - 3))
    sweep = make_sweep(unit="raw")
    scored = Linear(gain)
    sweep.contrast = scored  # pyright: ignore[reportAttributeAccessIssue]
    sweep.neutral = scored  # pyright: ignore[reportAttributeAccessIssue]
    options = [Direction(f"latent {i}", "candidate", torch.eye(D_MODEL)[i], i) for i in (2, 5, 0, 1)]
    found = greedy_sets(sweep, options, 3, [1.0])
    assert [[d.latent for d in chosen] for chosen in found] == [[0], [0, 1], [0, 1, 2]]


def test_a_set_is_pushed_along_the_sum_of_unit_vectors() -> None:
    pair = [
        Direction("latent 3", "candidate", 5 * torch.eye(D_MODEL)[0], 3),
        Direction("x", "candidate", torch.eye(D_MODEL)[1]),
    ]
    assert torch.allclose(joint(pair).vector, torch.eye(D_MODEL)[0] + torch.eye(D_MODEL)[1])
    assert joint(pair).name == "set 3 + x"
