"""An SAE that does not reconstruct the model on chat text is refused, with the measured value."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from persona_probe.errors import InputError
from persona_probe.saes.quality import check_explained_variance, quality_report
from persona_probe.saes.stream import residual_stream
from tests.factories import D_MODEL, D_SAE, LAYER, hook_count, make_model, make_sae, talks
from tests.families import make_family


def scaled_identity(share: float) -> Any:
    """An SAE whose reconstruction is `share` times its input."""
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, metadata=make_sae("standard").cfg.metadata))
    eye = torch.eye(D_MODEL)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(share * torch.cat([eye, -eye]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae


def test_the_fit_is_that_of_all_text_tokens(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tiny_sae: Any
) -> None:
    fit = check_explained_variance(tiny_model, tiny_tokenizer, tiny_sae, talks(), LAYER, minimum=-1e6)
    x = residual_stream(tiny_model, tiny_tokenizer, talks(), LAYER, bf16=False).double()
    out = tiny_sae(x.float()).detach().double()
    wanted = 1 - (x - out).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert fit.explained_variance == pytest.approx(wanted.item(), rel=1e-4)
    assert fit.n == len(x) and fit.residual_norm == pytest.approx(x.norm(dim=1).mean().item(), rel=1e-4)
    assert hook_count(tiny_model) == 0


def test_the_minimum_decides(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = check_explained_variance(tiny_model, tiny_tokenizer, scaled_identity(1.0), talks(), LAYER, minimum=1 - 1e-6)
    assert whole.explained_variance == pytest.approx(1.0, abs=1e-6)
    half = check_explained_variance(tiny_model, tiny_tokenizer, scaled_identity(0.6), talks(), LAYER)
    measured = half.explained_variance
    assert 0.5 < measured < 1
    check_explained_variance(tiny_model, tiny_tokenizer, scaled_identity(0.6), talks(), LAYER, measured - 1e-6)
    with pytest.raises(InputError, match=f"explains {measured:.2f} of the variance after layer {LAYER}"):
        check_explained_variance(tiny_model, tiny_tokenizer, scaled_identity(0.6), talks(), LAYER, measured + 1e-6)


def test_the_refusal_says_what_may_be_wrong(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny_model.config._name_or_path = "somebody/other-model"
    with pytest.raises(InputError) as caught:
        check_explained_variance(tiny_model, tiny_tokenizer, scaled_identity(0.1), talks(), LAYER)
    text = str(caught.value)
    assert "\n" not in text and re.search(r"explains -?\d\.\d\d of the variance", text)
    hook = f"blocks.{LAYER}.hook_resid_post"
    for part in ("minimum is 0.5", "trained on tiny", "somebody/other-model", hook, "chat model", "lower minimum_"):
        assert part in text


def test_another_layer_is_refused(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The best linear reconstruction of one layer, of rank 10, falls below its own fit at the others."""
    sae = scaled_identity(1.0)
    x = residual_stream(tiny_model, tiny_tokenizer, talks(), LAYER, bf16=False)
    axes = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False).Vh[:10]
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(dim=0))
        sae.W_dec.copy_(sae.W_dec @ axes.T @ axes)
    minimum = check_explained_variance(tiny_model, tiny_tokenizer, sae, talks(), LAYER).explained_variance - 1e-6
    check_explained_variance(tiny_model, tiny_tokenizer, sae, talks(), LAYER, minimum)
    for layer in (0, 2):
        with pytest.raises(InputError, match=f"of the variance after layer {layer}"):
            check_explained_variance(tiny_model, tiny_tokenizer, sae, talks(), layer, minimum)


@pytest.mark.parametrize("minimum", [1.5, float("nan")])
def test_a_minimum_that_nothing_reaches(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, minimum: float
) -> None:
    with pytest.raises(InputError, match="at most 1"):
        check_explained_variance(tiny_model, tiny_tokenizer, scaled_identity(1.0), talks(), LAYER, minimum)


def test_width_layer_and_text_are_checked_first(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    wide = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=8, num_hidden_layers=2, vocab_size=258))
    with pytest.raises(InputError, match="reads width 32"):
        check_explained_variance(wide, tiny_tokenizer, make_sae("topk"), talks(), LAYER)
    with pytest.raises(InputError, match="layers 0 to 2"):
        check_explained_variance(make_model(), tiny_tokenizer, make_sae("topk"), talks(), 3)
    with pytest.raises(InputError, match="no conversations given"):
        check_explained_variance(make_model(), tiny_tokenizer, make_sae("topk"), [], LAYER)


def test_one_token_has_no_variance(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"explains nan of the variance after layer 1 \(1 tokens\)"):
        check_explained_variance(
            tiny_model, tiny_tokenizer, scaled_identity(1.0), ["?"], LAYER, -9.0, positions="last_prompt"
        )


def test_an_sae_of_a_base_model_is_checked_on_plain_text(tmp_path: Path) -> None:
    model, tokenizer = make_family("gpt2")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    make_sae("standard").save_model(str(tmp_path / "sae"))
    given: dict[str, Any] = {"model_name": str(tmp_path / "model"), "data": ["neutral_probes"]}
    with pytest.raises(InputError, match="set template: none"):
        quality_report(str(tmp_path / "sae"), **given)
    assert quality_report(str(tmp_path / "sae"), template="none", **given)["tokens"].item() > 0
