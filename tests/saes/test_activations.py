"""An SAE's latents on texts are those of each row alone, in every family, with each token's text and part."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from persona_probe.data.chat import conversation
from persona_probe.data.tokens import encode as tokenise
from persona_probe.errors import InputError
from persona_probe.models.load import with_tokenizer
from persona_probe.models.taps import ReadTap
from persona_probe.saes.by_token import activations
from persona_probe.saes.read import encode
from tests.factories import LAYER, copied_state, hook_count, make_model, make_sae, make_tokenizer, same_state
from tests.families import AVAILABLE, make_family, plain

TEXTS = ["Why?", conversation("Ask of it?" * 4, "Say so, then!"), conversation("And?", "Well")]


@torch.no_grad()
def own(model: Any, sae: Any, ids: list[int]) -> Tensor:
    with ReadTap(model, LAYER) as tap:
        model(input_ids=torch.tensor([ids]))
    return encode(sae, tap.value[0])


@pytest.mark.parametrize("name", AVAILABLE)
def test_every_token_s_latents_are_those_of_its_row_alone(name: str) -> None:
    model, tokenizer = make_family(name)
    tokenizer, sae = plain(name, tokenizer), make_sae("standard")
    before, hooks = copied_state(model), hook_count(model)
    found = activations(model, sae, TEXTS, tokenizer=tokenizer, batch_size=2)
    for number, text in enumerate(TEXTS):
        row = tokenise(tokenizer, conversation(text) if isinstance(text, str) else text)
        torch.testing.assert_close(found.values[number], own(model, sae, row.ids), atol=1e-4, rtol=1e-4)
        assert "".join(found.tokens[number]) == tokenizer.decode(row.ids)
        said = [
            token for token, part in zip(found.tokens[number], found.parts[number], strict=True) if part == "answer"
        ]
        assert "".join(said) == ("" if isinstance(text, str) else text[-1]["content"])
    assert same_state(copied_state(model), before) and hook_count(model) == hooks


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_some_latents_are_the_columns_of_all(architecture: str) -> None:
    model, tokenizer, sae = make_model(), make_tokenizer(), make_sae(architecture)
    whole = activations(model, sae, TEXTS, tokenizer=tokenizer)
    some = activations(model, sae, TEXTS, tokenizer=tokenizer, latents=[40, 3])
    for left, right in zip(whole.values, some.values, strict=True):
        torch.testing.assert_close(left[:, [40, 3]], right)
    frame = some.of(3)
    assert list(frame.columns) == ["text", "token", "part", "activation"] and len(frame) == sum(map(len, some.tokens))
    assert torch.equal(torch.tensor(frame["activation"].to_numpy()), torch.cat(some.values)[:, 1])


def test_the_top_is_the_mean_over_tokens_that_are_not_special() -> None:
    model, sae = with_tokenizer(make_model(), make_tokenizer()), make_sae("topk")
    found = activations(model, sae, TEXTS)
    kept = torch.tensor([part != "special" for parts in found.parts for part in parts])
    means = torch.cat(found.values)[kept].mean(dim=0)
    top = found.top(5)
    assert list(top["latent"]) == means.topk(5).indices.tolist() and 0 < int(kept.sum()) < len(kept)
    torch.testing.assert_close(torch.tensor(top["mean"].to_numpy()).float(), means.topk(5).values)
    assert "<table" in found._repr_html_()


def test_a_peft_model_is_read_as_it_is_and_its_tokenizer_found() -> None:
    base, sae = with_tokenizer(make_model(), make_tokenizer()), make_sae("topk")
    before = activations(base, sae, "Why?").values[0]
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert not torch.allclose(activations(tuned, sae, "Why?").values[0], before)
    with tuned.disable_adapter():
        torch.testing.assert_close(activations(tuned, sae, "Why?").values[0], before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"texts": []}, "at least one prompt"),
        ({"latents": []}, "no latent"),
        ({"latents": [64]}, "latents 0 to 63"),
        ({"sae": make_sae("topk", hook="blocks.7.hook_resid_post")}, "layers 0 to 2"),
        ({"tokenizer": None}, "pass tokenizer="),
    ],
)
def test_what_cannot_be_read_is_said(settings: dict[str, Any], words: str) -> None:
    given = {"sae": make_sae("topk"), "texts": "Why?", "tokenizer": make_tokenizer(), **settings}
    with pytest.raises(InputError, match=words):
        activations(make_model(), **given)


def test_a_latent_that_was_not_read_is_said() -> None:
    with pytest.raises(InputError, match="latent 5 was not read"):
        activations(make_model(), make_sae("topk"), "Why?", tokenizer=make_tokenizer(), latents=[3]).of(5)
