"""One model goes on from another's activations, in every family, as whole rows through hooks on the models do."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from persona_probe.data.chat import conversation
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.evaluate.sampling.answering import generate
from persona_probe.models.layers import decoder_layer, decoder_layers
from persona_probe.models.places import Place
from persona_probe.models.prefix import Rows
from persona_probe.models.taps import EditTap, SteerTap
from persona_probe.saes.patching import latent_steering, patch
from persona_probe.saes.read import decode, encode
from tests.factories import D_MODEL, LAYER, copied_state, hook_count, make_model, make_sae, make_tokenizer, same_state
from tests.families import AVAILABLE, FAMILIES, family_model, make_family, own_scores, plain

TALKS = [conversation(f"Ask of {n}?" + "." * n, f"Say {n * n}, then" + "!" * (n % 3)) for n in range(5)]
LATENTS = [3, 7, 40]


@contextmanager
def by_hand(model: nn.Module, source: Any, change: Any) -> Iterator[None]:
    """Every row whole: a plain hook reads the source on the row's ids, another puts it in."""
    ids: list[Tensor] = []
    held: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        ids.append(kwargs["input_ids"])

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        held.append(output[0] if isinstance(output, tuple) else output)

    def edit(x: Tensor) -> Tensor:
        handle = decoder_layer(source, LAYER).register_forward_hook(keep)
        source(input_ids=ids[-1])
        handle.remove()
        return change(x, held[-1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    with EditTap(model, LAYER, edit):
        yield
    handle.remove()


def swapped(sae: Any) -> Any:
    """`x` with some latents of `y`, and its own error."""

    def change(x: Tensor, y: Tensor) -> Tensor:
        codes, out = encode(sae, x[0]), []
        for row in (codes, codes.clone()):
            if out:
                row[:, LATENTS] = encode(sae, y[0])[:, LATENTS]
            out.append(decode(sae, row, x[0]))
        return (x[0] + out[1] - out[0])[None]

    return change


@pytest.mark.parametrize("name", AVAILABLE)
def test_patched_scores_are_those_of_whole_rows_through_hooks(name: str) -> None:
    model, tokenizer = make_family(name)
    source, sae = family_model(name, seed=1), make_sae("topk")
    groups = answer_batches(plain(name, tokenizer), TALKS, 3)
    assert (Rows.of(groups[0], model.config.get_text_config()).shared > 0) != FAMILIES[name].recurrent
    before, hooks = copied_state(model), hook_count(model) + hook_count(source)
    plainly = own_scores(model, groups)
    for settings, change in (({"layer": LAYER}, lambda x, y: y), ({"sae": sae, "latents": LATENTS}, swapped(sae))):
        with by_hand(model, source, change):
            wanted = own_scores(model, groups)
        with patch(model, source, **settings):  # pyright: ignore
            found = answer_logprobs(model, groups, bf16=False)
        np.testing.assert_allclose(found, wanted, atol=2e-4)
        assert np.abs(found - plainly).max() > 1e-3
    assert same_state(copied_state(model), before) and hook_count(model) + hook_count(source) == hooks
    np.testing.assert_allclose(answer_logprobs(model, groups, bf16=False), plainly, atol=1e-4)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gemma4", "qwen3-moe"])
def test_a_model_patched_with_its_own_copy_is_itself(name: str) -> None:
    model, tokenizer = make_family(name)
    groups = answer_batches(plain(name, tokenizer), TALKS, 3)
    before = answer_logprobs(model, groups, bf16=False)
    with patch(model, family_model(name), LAYER):
        np.testing.assert_allclose(answer_logprobs(model, groups, bf16=False), before, atol=1e-5)
    with patch(model, family_model(name), sae=make_sae("standard"), latents=LATENTS):
        np.testing.assert_allclose(answer_logprobs(model, groups, bf16=False), before, atol=1e-5)


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gpt2", "falcon-h1"])
def test_a_tuned_model_patched_after_its_last_layer_is_its_base(name: str) -> None:
    base, tokenizer = make_family(name)
    groups = answer_batches(plain(name, tokenizer), TALKS, 3)
    before = answer_logprobs(base, groups, bf16=False)
    without = ["out_proj"] if name == "falcon-h1" else None
    lora = LoraConfig(r=2, target_modules="all-linear", exclude_modules=without, init_lora_weights=False)
    tuned = get_peft_model(base, lora)
    moved, modes = answer_logprobs(tuned, groups, bf16=False), [m.training for m in tuned.modules()]
    last = len(decoder_layers(tuned)) - 1
    with patch(tuned, None, last):
        found = answer_logprobs(tuned, groups, bf16=False)
    np.testing.assert_allclose(found, before, atol=1e-4)
    assert np.abs(moved - before).max() > 0.01
    np.testing.assert_allclose(answer_logprobs(tuned, groups, bf16=False), moved, atol=1e-4)
    assert [m.training for m in tuned.modules()] == modes


def test_one_place_of_a_layer_is_patched() -> None:
    model, source, ids = make_model(), make_model(seed=1), torch.arange(5, 25)[None]
    held: list[Tensor] = []
    handle = source.model.layers[LAYER].mlp.register_forward_hook(lambda _m, _i, out: held.append(out))
    with torch.no_grad():
        source(input_ids=ids)
        handle.remove()
        with EditTap(model, Place(LAYER, "mlp_out"), lambda _: held[0]):
            wanted = model(input_ids=ids).logits
        with patch(model, source, Place(LAYER, "mlp_out")):
            assert torch.equal(model(ids).logits, wanted)  # also where ids are given by position


def test_what_comes_after_an_error_is_as_before() -> None:
    model, source = make_model(), make_model(seed=1)
    hooks = hook_count(model) + hook_count(source)
    with pytest.raises(ZeroDivisionError), patch(model, source, LAYER):
        raise ZeroDivisionError
    assert hook_count(model) + hook_count(source) == hooks


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "or the layer"),
        ({"layer": 9}, "layers 0 to 2"),
        ({"layer": 1, "latents": [1]}, "give sae="),
        ({"sae": make_sae("topk")}, "name the latents"),
        ({"sae": make_sae("topk"), "latents": [64]}, "latents 0 to 63"),
        ({"sae": make_sae("topk"), "latents": [1], "layer": 1, "source": None}, "no adapter"),
        ({"layer": 1, "source": "itself"}, "share their layers"),
    ],
)
def test_what_cannot_be_patched_is_said(settings: dict[str, Any], words: str) -> None:
    model = make_model()
    settings = {"source": make_model(seed=1), **settings}
    settings["source"] = model if settings["source"] == "itself" else settings["source"]
    with pytest.raises(InputError, match=words), patch(model, **settings):
        pass


def test_sampling_and_embeddings_are_refused() -> None:
    model, source = make_model(), make_model(seed=1)
    with pytest.raises(InputError, match="do not sample"), patch(model, source, LAYER):
        generate(model, "Why?", tokenizer=make_tokenizer(), max_new_tokens=4)
    with pytest.raises(InputError, match="token ids"), patch(model, source, LAYER):
        model(inputs_embeds=torch.zeros(1, 3, D_MODEL))


# --- Answers under the push of a latent


@pytest.mark.parametrize("name", AVAILABLE)
def test_answers_under_a_latent_s_push_are_those_of_its_decoder_row(name: str) -> None:
    model, tokenizer = make_family(name)
    settings: dict[str, Any] = {"tokenizer": plain(name, tokenizer), "max_new_tokens": 8, "temperature": 0.0}
    sae = make_sae("topk")
    asked = ["Why?", "Who are you, then?"]
    steered = generate(model, asked, steer=latent_steering(sae, 7, 999.0), **settings)
    with SteerTap(model, LAYER, 999 * sae.W_dec[7].detach()):
        assert generate(model, asked, **settings) == steered
    if name != "gemma4-text":  # its answers here are thoughts, which are not shown
        assert generate(model, asked, **settings) != steered


def test_a_push_of_the_answer_alone_leaves_the_prompt() -> None:
    model, tokenizer, sae = make_model(), make_tokenizer(), make_sae("topk")
    answers = [
        generate(
            model, "Why?", tokenizer=tokenizer, temperature=0.0, max_new_tokens=8,
            steer=latent_steering(sae, 7, 60.0, positions=positions),
        )
        for positions in ("all", "prompt", "response")
    ]  # fmt: skip
    assert len({text[0] for text in answers}) == 3


def test_a_seed_gives_the_same_answers_again_and_a_question_several() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    several = generate(model, ["Why?"] * 4, tokenizer=tokenizer, max_new_tokens=6, seed=3)
    assert len(set(several)) > 1 and several == generate(
        model, ["Why?"] * 4, tokenizer=tokenizer, max_new_tokens=6, seed=3
    )
    with pytest.raises(InputError, match="latents 0 to 63"):
        latent_steering(make_sae("topk"), 64)
    with pytest.raises(InputError, match="pass tokenizer="):
        generate(model, "Why?")
