"""The logit lens is the model's own last steps on its own hidden states, in every family."""

from typing import Any

import pytest
import torch
from torch import Tensor

from persona_probe.data.chat import conversation
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.latents.cards import logit_effect
from persona_probe.models.layers import base_transformer, decoder_layers
from persona_probe.models.lens import logit_lens
from persona_probe.models.load import with_tokenizer
from persona_probe.models.logits import final_norm, own_logits
from persona_probe.models.taps import EditTap, Steer, SteerTap
from tests.factories import D_MODEL, LAYER, copied_state, hook_count, make_model, make_tokenizer, same_state
from tests.families import AVAILABLE, make_family, plain

TALKS = [conversation(f"Ask of {n}?" + "." * n, f"Say {n * n}, then" + "!" * (n % 3)) for n in range(3)]
PUSH = 3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))


def rows(name: str, tokenizer: Any) -> list[tuple[Tensor, slice]]:
    """Token ids of each talk alone, and where its answer is."""
    encoded = [encode(plain(name, tokenizer), talk) for talk in TALKS]
    return [(torch.tensor([row.ids]), slice(row.start, len(row.ids))) for row in encoded]


@torch.no_grad()
def own(model: Any, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """The model's own logits where the last layer's output is that of `layer`, and that output."""
    held: list[Tensor] = []
    with EditTap(model, layer, lambda x: held.append(x) or x):
        base_transformer(model)(input_ids=ids, use_cache=False)
    with EditTap(model, len(decoder_layers(model)) - 1, lambda _: held[0]):
        return own_logits(model, input_ids=ids)[0], held[0][0]


@pytest.mark.parametrize("name", AVAILABLE)
def test_the_lens_at_each_layer_is_the_model_s_own_last_steps(name: str) -> None:
    model, tokenizer = make_family(name)
    before, hooks = copied_state(model), hook_count(model)
    lens = logit_lens(model, TALKS, tokenizer=plain(name, tokenizer), batch_size=2)
    assert lens.layers == tuple(range(len(decoder_layers(model))))
    for place, layer in enumerate(lens.layers):
        found = [(own(model, ids, layer), at) for ids, at in rows(name, tokenizer)]
        wanted = torch.stack([logits[at].mean(dim=0) for (logits, _), at in found]).mean(dim=0)
        states = torch.stack([state[at].mean(dim=0) for (_, state), at in found]).mean(dim=0)
        torch.testing.assert_close(lens.logits[place], wanted, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(lens.states[place], states, atol=1e-4, rtol=1e-4)
    assert same_state(copied_state(model), before) and hook_count(model) == hooks


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gpt2", "falcon-h1"])
def test_a_push_is_seen_as_half_of_what_both_signs_change(name: str) -> None:
    model, tokenizer = make_family(name)
    lens = logit_lens(model, TALKS, tokenizer=plain(name, tokenizer), steer=Steer(LAYER, PUSH, 2.0))
    assert lens.layers[0] == LAYER
    for place, layer in enumerate(lens.layers):
        sides = []
        for sign in (2.0, -2.0):
            with SteerTap(model, LAYER, sign * PUSH):
                found = [own(model, ids, layer)[0][at].mean(dim=0) for ids, at in rows(name, tokenizer)]
            sides.append(torch.stack(found).mean(dim=0))
        torch.testing.assert_close(lens.logits[place], (sides[0] - sides[1]) / 2, atol=3e-4, rtol=1e-3)
    torch.testing.assert_close(lens.states[0], 2 * PUSH, atol=1e-4, rtol=1e-4)


def test_an_unembedding_with_a_bias_does_not_add_it_to_a_change() -> None:
    model: Any = make_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-9, 9, model.lm_head.weight.shape[0]))
    kept = logit_lens(model, "Why?", tokenizer=make_tokenizer(), steer=Steer(LAYER, PUSH)).logits
    model.lm_head.bias = None
    torch.testing.assert_close(
        kept, logit_lens(model, "Why?", tokenizer=make_tokenizer(), steer=Steer(LAYER, PUSH)).logits
    )


@pytest.mark.parametrize("name", AVAILABLE)
def test_the_final_norm_is_found_whatever_its_name(name: str) -> None:
    model, _ = make_family(name)
    norm = final_norm(model)
    assert norm is not None and not [layer for layer in decoder_layers(model) if norm in set(layer.modules())]
    # A direction's effect goes through it: with the norm's gain doubled, the effect doubles.
    effect = logit_effect(model, PUSH)
    with torch.no_grad():
        gain = norm.get_parameter("weight")
        of_ones = norm(torch.ones(D_MODEL))
        gain.mul_(2) if torch.allclose(of_ones, gain, atol=1e-3) or isinstance(norm, torch.nn.LayerNorm) else gain.add_(
            of_ones
        )
    torch.testing.assert_close(logit_effect(model, PUSH), 2 * effect, atol=1e-3, rtol=1e-3)


def test_the_table_names_tokens_layer_by_layer() -> None:
    model = with_tokenizer(make_model(), make_tokenizer())
    table = logit_lens(model, "Why?", layers=[0, 2]).table(3)
    assert list(table.index) == [0, 2] and list(table.columns) == ["size", "top tokens", "probability"]
    pushed = logit_lens(model, ["Why?"], steer=Steer(LAYER, PUSH))
    assert list(pushed.table().columns) == ["size", "promotes", "suppresses"] and "<table" in pushed._repr_html_()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": [7]}, "layers 0 to 2"),
        ({"layers": []}, "name some"),
        ({"positions": "response"}, "no token at positions"),
        ({"positions": "answer"}, "unknown positions"),
        ({"texts": []}, "at least one prompt"),
        ({"tokenizer": None}, "pass tokenizer="),
        ({"steer": Steer(9, PUSH)}, "layers 0 to 2"),
        ({"steer": Steer(1, PUSH[:4])}, "width 4"),
    ],
)
def test_what_cannot_be_looked_at_is_said(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        logit_lens(make_model(), **{"texts": ["Why?"], "tokenizer": make_tokenizer(), **settings})
