"""Places inside a layer hold what the modules themselves get and give, in every family."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from persona_probe.errors import InputError
from persona_probe.models.layers import decoder_layers, forward_to_layer
from persona_probe.models.places import PARTS, Normalizer, Place, find_site
from persona_probe.models.taps import ablate, read, steer, taps_on
from tests.factories import hook_count
from tests.families import AVAILABLE, family_model

IDS = torch.arange(24).reshape(2, 12) + 60  # bytes: no special token, no image
IN_SEQUENCE = (
    "llama3",
    "qwen2.5",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi4",
    "olmo2",
    "gpt2",
    "gpt-oss",
    "mixtral",
)
"""Families whose layer is: residual + attention, then + MLP; no multipliers, and attention in every layer."""
NO_ATTENTION = {"qwen3.5": "linear_attn", "lfm2": "conv"}
"""Hybrid families, and what stands in place of attention in their first layer."""


def kept(module: nn.Module, side: str, run: Callable[[], object]) -> Tensor:
    """What a module gets or gives, by a hook of the test's own."""
    found: list[Any] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    def after(_module: nn.Module, _args: object, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    if side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    with torch.no_grad():
        run()
    handle.remove()
    return found[-1]


def all_parts(model: Any, layer: int, parts: tuple[str, ...]) -> dict[str, Tensor]:
    with ExitStack() as stack, torch.no_grad():
        taps = {part: stack.enter_context(read(model, Place(layer, part))) for part in parts}
        model(IDS)
    return {part: tap.value for part, tap in taps.items()}


def attention_layer(model: Any) -> int:
    """The last layer that has attention."""
    return max(n for n, layer in enumerate(decoder_layers(model)) if has(layer, "self_attn", "attn", "attention"))


def has(module: nn.Module, *names: str) -> nn.Module | None:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


@pytest.mark.parametrize("family", AVAILABLE)
def test_every_place_is_what_its_module_gets_or_gives(family: str) -> None:
    model = family_model(family)
    number = attention_layer(model)
    layer: Any = decoder_layers(model)[number]
    attention: Any = has(layer, "self_attn", "attn", "attention")
    mlp: Any = has(layer, "mlp", "feed_forward")
    projection: Any = has(attention, "o_proj", "c_proj", "dense", "out_proj")
    normed = hasattr(layer, "post_feedforward_layernorm")
    own = {
        "resid_post": (layer, "output"),
        "attn_module": (attention, "output"),
        "attn_z": (projection, "input"),
        "attn_out": (layer.post_attention_layernorm if normed else attention, "output"),
        "mlp_module": (mlp, "output"),
        "mlp_in": (mlp, "input"),
        "mlp_out": (layer.post_feedforward_layernorm if normed else mlp, "output"),
    }
    values = all_parts(model, number, tuple(own))
    for part, (module, side) in own.items():
        wanted = kept(module, side, lambda: model(IDS))
        assert torch.equal(values[part], wanted), part
        assert find_site(model, Place(number, part)).width == wanted.shape[-1]
    path = next(name for name, module in layer.named_modules() if module is projection)
    with torch.no_grad():
        assert torch.allclose(projection(values["attn_z"]), values["attn_module"], atol=1e-5)
        with read(model, Place(number, f"{path}.input")) as tap:
            forward_to_layer(model, number, input_ids=IDS, use_cache=False)
    assert torch.equal(tap.value, values["attn_z"]) and hook_count(model) == 0


@pytest.mark.parametrize("family", IN_SEQUENCE)
def test_attention_and_mlp_add_up_to_the_layer(family: str) -> None:
    model = family_model(family)
    parts = all_parts(model, 1, ("resid_post", "attn_out", "mlp_out"))
    with torch.no_grad(), read(model, 0) as before:
        model(IDS)
    assert torch.allclose(before.value + parts["attn_out"] + parts["mlp_out"], parts["resid_post"], atol=1e-4)


@pytest.mark.parametrize("family", AVAILABLE)
def test_normalised_streams_are_the_norms_without_their_gain(family: str) -> None:
    model = family_model(family)
    number = attention_layer(model)
    layer: Any = decoder_layers(model)[number]
    norms = {
        "ln1_normalized": has(layer, "input_layernorm", "ln_1", "operator_norm"),
        "ln2_normalized": has(layer, "pre_feedforward_layernorm", "pre_ff_layernorm", "ffn_norm", "ln_2"),
    }
    if family == "olmo2":
        for part in norms:
            with pytest.raises(InputError, match=r"has no norm before its"):
                read(model, Place(number, part))
        return
    norms["ln2_normalized"] = norms["ln2_normalized"] or layer.post_attention_layernorm
    values = all_parts(model, number, tuple(norms))
    for part, module in norms.items():
        assert module is not None
        norm: Any = module
        given = kept(norm, "input", lambda: model(IDS))
        one = type(norm).__name__ in ("Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3_5RMSNorm")  # gain 1 + w
        centred = isinstance(norm, nn.LayerNorm)
        x = given - given.mean(dim=-1, keepdim=True) if centred else given
        eps = getattr(norm, "eps", None) or norm.variance_epsilon
        wanted = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
        assert torch.allclose(values[part], wanted, atol=1e-5), part
        gain, bias = norm.weight.detach(), getattr(norm, "bias", None)
        rebuilt = wanted * (1 + gain if one else gain) + (0 if bias is None else bias.detach())
        assert torch.allclose(rebuilt, kept(norm, "output", lambda: model(IDS)), atol=1e-4), part


@pytest.mark.parametrize("family", IN_SEQUENCE)
def test_a_push_at_a_place_reaches_the_residual_stream(family: str) -> None:
    model = family_model(family)
    width = find_site(model, 1).width
    push = torch.randn(width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), read(model, 1) as plain:
        model(IDS)
    with torch.no_grad(), read(model, 1) as pushed, steer(model, Place(1, "mlp_out"), push, 2.0):
        model(IDS)
    assert torch.allclose(pushed.value, plain.value + 2 * push, atol=1e-4)
    # What the heads put out is pushed before the projection, which maps it into the residual stream.
    place = Place(1, "attn_z")
    site = find_site(model, place)
    z = torch.randn(site.width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = all_parts(model, 1, ("attn_module",))["attn_module"]
        with steer(model, place, z):
            after = all_parts(model, 1, ("attn_module",))["attn_module"]
        mapped = site.module(z[None, None].expand(2, 12, -1)) - site.module(torch.zeros(2, 12, site.width))
    assert torch.allclose(after - before, mapped, atol=1e-4)


def test_an_ablation_at_a_place_removes_the_direction_there() -> None:
    model, place = family_model("gemma2"), Place(1, "attn_out")
    direction = torch.randn(find_site(model, place).width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), ablate(model, place, direction), read(model, place) as tap:
        model(IDS)
        assert [type(found).__name__ for found in taps_on(model)] == ["AblateTap", "ReadTap"]
    assert float((tap.value @ direction).abs().max()) < 1e-4 * float(tap.value.norm(dim=-1).max())


@pytest.mark.parametrize(("family", "instead"), NO_ATTENTION.items())
def test_a_layer_without_attention_says_what_it_has(family: str, instead: str) -> None:
    model = family_model(family)
    for part in ("attn_out", "attn_z"):
        with pytest.raises(
            InputError, match=rf"layer 0 .* has no attention \({instead} stands in its place\)"
        ) as caught:
            read(model, Place(0, part))
        assert "\n" not in str(caught.value) and hook_count(model) == 0


def test_places_that_do_not_exist_are_named() -> None:
    model = family_model("llama3")
    with pytest.raises(InputError, match="layers 0 to 2"):
        read(model, Place(3, "mlp_out"))
    with pytest.raises(InputError, match="unknown place 'mlp_ou'"):
        read(model, Place(1, "mlp_ou"))
    with pytest.raises(InputError, match=r"no module 'self_attn\.x_proj': there are q_proj, k_proj"):
        read(model, Place(1, "self_attn.x_proj.input"))
    with pytest.raises(InputError, match="can be read, not pushed"):
        steer(model, Place(1, "ln2_normalized"), torch.ones(find_site(model, 1).width))
    with pytest.raises(InputError, match="no LayerNorm or RMSNorm"):
        Normalizer(nn.Linear(4, 4))
    assert set(PARTS) >= {"resid_post", "attn_out", "attn_z", "mlp_out", "mlp_in"}
