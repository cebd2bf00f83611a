"""Taps agree with transformers' own hidden states, change what they say, and leave nothing behind."""

import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.models.layers import decoder_layers
from persona_probe.models.taps import ReadTap, ablate, read, resolve_push, steer
from tests.factories import ARCHITECTURES, D_MODEL, LAYER, hook_count, make_model

IDS = torch.arange(40).reshape(2, 20) + 5
GENERATOR = torch.Generator().manual_seed(1)
DIRECTION = torch.randn(D_MODEL, generator=GENERATOR)


def hidden(model: torch.nn.Module, layer: int) -> torch.Tensor:
    with torch.no_grad(), read(model, layer) as tap:
        model(IDS)
    return tap.value


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 1])
def test_reading_is_transformers_hidden_state(architecture: str, layer: int) -> None:
    model = make_model(architecture)
    with torch.no_grad():
        wanted = model(IDS, output_hidden_states=True).hidden_states[layer + 1]
    assert torch.equal(hidden(model, layer), wanted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steering_adds_exactly_the_push(architecture: str) -> None:
    model = make_model(architecture)
    before = hidden(model, LAYER)
    with steer(model, LAYER, DIRECTION, 2.0):
        during = hidden(model, LAYER)
    assert torch.equal(during, before + 2.0 * DIRECTION)
    assert torch.equal(hidden(model, LAYER), before)


def test_a_push_moves_the_layers_above_and_not_below(tiny_model: torch.nn.Module) -> None:
    below, above = hidden(tiny_model, 0), hidden(tiny_model, 2)
    with steer(tiny_model, LAYER, DIRECTION, 3.0):
        assert torch.equal(hidden(tiny_model, 0), below)
        assert not torch.allclose(hidden(tiny_model, 2), above, atol=0.1)


def test_strength_zero_changes_nothing_bit_for_bit(tiny_model: torch.nn.Module) -> None:
    with torch.no_grad():
        plain = tiny_model(IDS).logits
        with steer(tiny_model, LAYER, DIRECTION, 0.0):
            assert torch.equal(tiny_model(IDS).logits, plain)


@pytest.mark.parametrize("positions", ["prompt", "response"])
def test_positions_push_only_their_tokens(tiny_model: torch.nn.Module, positions: str) -> None:
    prompt = torch.arange(20)[None, :] < torch.tensor([[6], [11]])
    before = hidden(tiny_model, LAYER)
    with steer(tiny_model, LAYER, DIRECTION, positions=positions, prompt_mask=prompt):
        moved = (hidden(tiny_model, LAYER) - before).norm(dim=-1) > 0.1
    assert torch.equal(moved, prompt if positions == "prompt" else ~prompt)


@pytest.mark.parametrize(("positions", "moves"), [("prompt", False), ("response", True), ("all", True)])
def test_a_cached_new_token_counts_as_response(tiny_model: torch.nn.Module, positions: str, moves: bool) -> None:
    one = IDS[:, :1]
    with torch.no_grad(), read(tiny_model, LAYER) as plain:
        tiny_model(one)
    mask = torch.ones(2, 20, dtype=torch.bool)
    push = steer(tiny_model, LAYER, DIRECTION, positions=positions, prompt_mask=mask)
    with torch.no_grad(), push, read(tiny_model, LAYER) as pushed:
        tiny_model(one)
    assert torch.allclose(pushed.value - plain.value, DIRECTION * float(moves), atol=1e-5)


def test_ablation_zeroes_the_projection_and_is_idempotent(tiny_model: torch.nn.Module) -> None:
    unit = DIRECTION / DIRECTION.norm()
    before = hidden(tiny_model, LAYER)
    with ablate(tiny_model, LAYER, DIRECTION):
        once = hidden(tiny_model, LAYER)
        with ablate(tiny_model, LAYER, 5 * DIRECTION):
            twice = hidden(tiny_model, LAYER)
    assert float((before @ unit).abs().max()) > 0.1
    assert float((once @ unit).abs().max()) < 1e-5
    assert torch.allclose(once, before - (before @ unit)[..., None] * unit, atol=1e-5)
    assert torch.allclose(twice, once, atol=1e-5)


def test_ablating_a_span_takes_the_span_and_no_more(tiny_model: torch.nn.Module) -> None:
    other = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2))
    before = hidden(tiny_model, LAYER)
    with ablate(tiny_model, LAYER, torch.stack([DIRECTION, other])):
        both = hidden(tiny_model, LAYER)
    assert float((both @ torch.stack([DIRECTION, other]).T).abs().max()) < 1e-4
    with ablate(tiny_model, LAYER, DIRECTION):
        single = hidden(tiny_model, LAYER)
    with ablate(tiny_model, LAYER, torch.stack([DIRECTION, 2 * DIRECTION])):
        repeated = hidden(tiny_model, LAYER)
    assert torch.allclose(repeated, single, atol=1e-4)
    assert not torch.allclose(single, before, atol=0.1)


def test_units_scale_as_documented() -> None:
    unit = DIRECTION / DIRECTION.norm()
    assert torch.equal(resolve_push(DIRECTION, 3.0, "raw").vector, 3.0 * DIRECTION)
    assert torch.allclose(resolve_push(DIRECTION, 3.0, "x_delta").vector, 3.0 * DIRECTION, atol=1e-5)
    assert torch.allclose(resolve_push(DIRECTION, -2.0, "x_resid", 7.0).vector, -14.0 * unit, atol=1e-5)
    assert torch.allclose(resolve_push(9 * DIRECTION, 2.0, "x_delta", 7.0).vector, 14.0 * unit, atol=1e-5)


def test_bad_input_says_what_to_change(tiny_model: torch.nn.Module) -> None:
    with pytest.raises(InputError, match="layers 0 to 2"):
        read(tiny_model, 3)
    with pytest.raises(InputError, match="layers 0 to 2"):
        steer(tiny_model, -1, DIRECTION)
    with pytest.raises(InputError, match=f"width 7, the model {D_MODEL}"):
        steer(tiny_model, LAYER, torch.ones(7))
    with pytest.raises(InputError, match=f"width 7, the model {D_MODEL}"):
        ablate(tiny_model, LAYER, torch.ones(7))
    with pytest.raises(InputError, match="did you mean 'x_delta'"):
        steer(tiny_model, LAYER, DIRECTION, unit="x_dleta")
    with pytest.raises(InputError, match="did you mean 'response'"):
        steer(tiny_model, LAYER, DIRECTION, positions="reponse")
    with pytest.raises(InputError, match="needs prompt_mask"):
        steer(tiny_model, LAYER, DIRECTION, positions="prompt")
    with pytest.raises(InputError, match="needs reference_norm"):
        steer(tiny_model, LAYER, DIRECTION, unit="x_resid")
    assert hook_count(tiny_model) == 0


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_zero_or_infinite_direction_is_refused(tiny_model: torch.nn.Module, value: float) -> None:
    for tap in (steer, ablate):
        with pytest.raises(InputError, match="zero or not finite"):
            tap(tiny_model, LAYER, torch.full((D_MODEL,), value))
    assert hook_count(tiny_model) == 0


def test_a_mask_of_another_shape_is_refused(tiny_model: torch.nn.Module) -> None:
    mask = torch.ones(2, 7, dtype=torch.bool)
    with (
        pytest.raises(InputError, match=r"shape \(2, 7\), the batch \(2, 20\)"),
        steer(tiny_model, LAYER, DIRECTION, positions="prompt", prompt_mask=mask),
    ):
        tiny_model(IDS)
    assert hook_count(tiny_model) == 0


def test_a_tap_that_never_fired_raises_but_does_not_hide_an_exception(tiny_model: torch.nn.Module) -> None:
    with pytest.raises(InputError, match="never fired"), read(tiny_model, LAYER):
        pass
    with pytest.raises(KeyError), read(tiny_model, LAYER):
        raise KeyError("first")
    assert hook_count(tiny_model) == 0


def test_no_hook_is_left_after_the_block_or_an_exception(tiny_model: torch.nn.Module) -> None:
    layer = decoder_layers(tiny_model)[LAYER]
    with steer(tiny_model, LAYER, DIRECTION), ablate(tiny_model, LAYER, DIRECTION):
        tiny_model(IDS)
        assert len(layer._forward_hooks) == 2
    assert len(layer._forward_hooks) == 0
    with pytest.raises(RuntimeError), ReadTap(tiny_model, LAYER):
        tiny_model(IDS)
        raise RuntimeError
    assert len(layer._forward_hooks) == 0
