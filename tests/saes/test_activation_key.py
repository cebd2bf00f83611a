"""Anything that decides a stream is in its key, and nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from persona_probe.errors import InputError
from persona_probe.models.activation_cache import ActivationCache
from persona_probe.models.adapters import base_weights, folded
from persona_probe.models.identity import why_not
from persona_probe.models.layers import base_transformer, decoder_layer
from persona_probe.models.taps import steer
from tests.factories import D_MODEL, LAYER, make_model
from tests.saes.activation_streams import POSITIONS, adapted, groups, stream


@pytest.fixture
def cache(tmp_path: Path) -> ActivationCache:
    return ActivationCache(tmp_path / "cache")


def rewired(change: Callable[[PreTrainedModel], object]) -> PreTrainedModel:
    model = make_model()
    with torch.no_grad():
        change(model)
    return model


def with_scale(factor: float) -> PeftModel:
    tuned = adapted()
    for module in tuned.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(factor)
    return tuned


MISSES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "adapter": lambda: (adapted(), {}),
    "adapter seed": lambda: (adapted(seed=4), {}),
    "adapter scale": lambda: (with_scale(2.0), {}),
    "one weight": lambda: (rewired(lambda m: next(decoder_layer(m, LAYER).parameters()).view(-1)[0].add_(1e-3)), {}),
    "configuration": lambda: (rewired(lambda m: setattr(base_transformer(m).config, "rms_norm_eps", 1e-2)), {}),
    "attention kernel": lambda: (rewired(lambda m: m.set_attn_implementation("eager")), {}),
    "setting": lambda: (rewired(lambda m: setattr(m.get_submodule("model.layers.0.mlp"), "act_fn", nn.ReLU())), {}),
    "layer": lambda: (make_model(), {"layer": 0}),
    "positions": lambda: (make_model(), {"positions": ("response",)}),
    "precision": lambda: (make_model(), {"bf16": True}),
    "text": lambda: (make_model(), {"groups": groups(5)}),
}


def test_what_decides_the_stream_is_in_the_key(cache: ActivationCache) -> None:
    stream(make_model(), cache)
    for number, (name, make) in enumerate(MISSES.items(), start=1):
        model, changed = make()
        before = cache.hits
        found = stream(model, cache, **changed)
        # Five conversations make a first batch of four that is the same as before.
        assert cache.hits == before + (name == "text"), name
        assert torch.equal(found, stream(make()[0], None, **changed)), name
        assert cache.hits + cache.misses == 2 * (number + 1), name


def test_what_does_not_decide_it_is_not(cache: ActivationCache, tiny_folder: Path) -> None:
    plain = stream(make_model(), cache)
    same: list[nn.Module] = [
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        rewired(lambda m: next(decoder_layer(m, LAYER + 1).parameters()).add_(1)),
        make_model().train().requires_grad_(False),
    ]
    called = make_model()
    called(groups()[0].ids, output_hidden_states=True)
    for model in (*same, called):
        assert torch.equal(stream(model, cache), plain)
    with base_weights(adapted()) as base:
        assert torch.equal(stream(base, cache, positions=POSITIONS[::-1]), plain)
    assert (cache.misses, cache.hits) == (2, 10)


def test_an_adapter_on_off_and_folded(cache: ActivationCache) -> None:
    tuned = adapted()
    on = stream(tuned, cache)
    with base_weights(tuned):
        off = stream(tuned, cache)
    with folded(tuned, bf16=False):
        inside = stream(tuned, cache)
    assert cache.hits == 0 and not torch.allclose(on, off, atol=0.1)
    assert torch.allclose(on, inside, atol=1e-3)
    assert torch.equal(stream(tuned, cache), on)
    with folded(tuned, bf16=False):
        assert torch.equal(stream(tuned, cache), inside)
    assert cache.hits == 4
    with folded(adapted(seed=4), bf16=False) as other:
        stream(other, cache)
    assert cache.hits == 4


def test_a_model_with_hooks_is_read_without_the_cache(cache: ActivationCache, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    plain = stream(model, cache)
    with steer(model, layer=0, direction=torch.ones(D_MODEL), strength=1.0, unit="raw"):
        pushed = stream(model, cache)
        assert torch.equal(pushed, stream(model, None))
    assert "not used: a hook on layers.0" in caplog.text
    own = base_transformer(model).forward
    base_transformer(model).forward = lambda *args, **kwargs: own(*args, **kwargs)
    stream(model, cache)
    assert "the forward of the model is replaced" in caplog.text
    assert not torch.allclose(pushed, plain) and (cache.misses, cache.hits) == (2, 0)


def test_weights_elsewhere_have_no_key() -> None:
    assert why_not(make_model(), LAYER) is None
    elsewhere = make_model().to(torch.device("meta"))  # pyright: ignore[reportArgumentType]
    assert "embed_tokens are not plain tensors in memory" in str(why_not(elsewhere, LAYER))


def test_a_missing_layer_is_the_readers_error(cache: ActivationCache) -> None:
    with pytest.raises(InputError, match="layer 9 does not exist"):
        stream(make_model(), cache, layer=9)
