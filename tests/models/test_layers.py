"""Forward passes that stop early, and modes and random state that come back."""

import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration

from persona_probe.errors import InputError
from persona_probe.models.layers import (
    base_transformer,
    decoder_layer,
    decoder_layers,
    evaluating,
    hidden_size,
    layer_list_name,
    run_to_layer,
)
from persona_probe.models.taps import ReadTap
from tests.factories import ARCHITECTURES, D_MODEL, SHAPE, hook_count, make_model

IDS = torch.arange(12).reshape(2, 6) + 5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_run_to_layer_runs_nothing_above_and_leaves_nothing(architecture: str) -> None:
    model = make_model(architecture)
    calls: list[int] = []
    layers = decoder_layers(model)
    handles = [layer.register_forward_pre_hook(lambda *_, n=n: calls.append(n)) for n, layer in enumerate(layers)]
    with torch.no_grad(), ReadTap(model, 1) as tap:
        run_to_layer(model, 1, IDS, torch.ones_like(IDS))
    assert calls == [0, 1]
    for handle in handles:
        handle.remove()
    assert hook_count(model) == 0
    with torch.no_grad(), ReadTap(model, 1) as whole:
        model(IDS)
    assert torch.equal(tap.value, whole.value)


def test_run_to_layer_leaves_nothing_when_a_layer_raises(tiny_model: torch.nn.Module) -> None:
    def fail(*_: object) -> None:
        raise KeyError("layer")

    handle = decoder_layer(tiny_model, 0).register_forward_hook(fail)
    with pytest.raises(KeyError):
        run_to_layer(tiny_model, 1, IDS, torch.ones_like(IDS))
    handle.remove()
    assert hook_count(tiny_model) == 0


def test_evaluating_puts_back_every_mode_and_the_random_state(tiny_model: torch.nn.Module) -> None:
    tiny_model.train()
    decoder_layer(tiny_model, 1).eval()
    modes = [m.training for m in tiny_model.modules()]
    state = torch.get_rng_state()
    with evaluating(tiny_model):
        assert not any(m.training for m in tiny_model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3)
    assert torch.is_grad_enabled()
    assert [m.training for m in tiny_model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ZeroDivisionError), evaluating(tiny_model):
        torch.rand(3)
        raise ZeroDivisionError
    assert [m.training for m in tiny_model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_and_width_are_found(architecture: str) -> None:
    model = make_model(architecture)
    assert len(decoder_layers(model)) == 3
    assert hidden_size(model) == 32


def test_other_modules_are_refused() -> None:
    with pytest.raises(InputError, match="need a transformers model"):
        decoder_layers(torch.nn.Linear(2, 2))


def test_the_decoder_is_found_inside_a_multimodal_model_that_wraps_a_whole_causal_model() -> None:
    """Llama 4: its `get_decoder` gives a model with a head; its vision tower has a list of layers too."""
    text = SHAPE | {"intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 1}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"patch_size": 4, "image_size": 16, "vision_output_dim": 16}
    tower |= {"projector_input_dim": 16, "projector_output_dim": 16}
    model = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=tower, image_token_index=257))
    assert type(base_transformer(model)).__name__ == "Llama4TextModel"
    assert len(decoder_layers(model)) == 3 and hidden_size(model) == D_MODEL


def test_layers_are_found_by_their_number_under_any_name() -> None:
    model = make_model()
    transformer = base_transformer(model)
    transformer._modules["floors"] = transformer._modules.pop("layers")
    assert layer_list_name(transformer) == "floors"
    assert len(decoder_layers(model)) == 3
