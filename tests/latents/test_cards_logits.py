"""What a decoder row writes equals what TransformerLens says, whatever the model's final norm."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from persona_probe.latents.cards import end_tokens, logit_effect
from persona_probe.models.load import make_bridge
from persona_probe.models.logits import final_norm
from tests.factories import ARCHITECTURES, D_MODEL, copied_state, make_model, make_sae, make_tokenizer, same_state

ROW = make_sae("topk").W_dec[7].detach()


def with_uneven_norm(architecture: str) -> PreTrainedModel:
    """A fresh model's final norm multiplies by one everywhere: here it does not."""
    model = make_model(architecture)
    norm = final_norm(model)
    assert norm is not None
    with torch.no_grad():
        norm.get_parameter("weight").copy_(torch.linspace(0.2, 1.7, D_MODEL))
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_logit_effect_is_the_bridges(architecture: str, tiny_folder: Path) -> None:
    model = with_uneven_norm(architecture)
    model.config.architectures = [type(model).__name__]  # as in any saved model; the bridge asks for it
    before = copied_state(model)
    bridge = make_bridge(model, AutoTokenizer.from_pretrained(tiny_folder), None, "tiny")
    with torch.no_grad():
        centred = ROW - ROW.mean() if architecture == "gpt2" else ROW
        # the bridge divides by the vector's own size and adds the norm's shift: both are taken back
        normed = bridge.ln_final(ROW[None, None])
        shift = bridge.ln_final(torch.zeros(1, 1, D_MODEL))
        wanted = bridge.unembed(normed) - bridge.unembed(shift)
    found = logit_effect(model, ROW)
    assert torch.allclose(found, wanted[0, 0] * centred.pow(2).mean().sqrt(), atol=1e-3)
    assert float(found.abs().max()) > 0.5
    assert same_state(copied_state(model), before)


def test_gemmas_stored_scale_is_one_less_than_it_multiplies_by() -> None:
    plain, gemma = with_uneven_norm("llama"), with_uneven_norm("gemma3")
    head = plain.get_submodule("lm_head").get_parameter("weight")
    with torch.no_grad():
        gemma.get_submodule("lm_head").get_parameter("weight").copy_(head)
    assert torch.allclose(logit_effect(gemma, ROW) - logit_effect(plain, ROW), head.detach() @ ROW, atol=1e-4)


def test_both_ends_come_strongest_first() -> None:
    logits = torch.zeros(258)
    logits[[70, 71, 72, 73]] = torch.tensor([2.0, 3.0, -1.0, -4.0])
    tokenizer = make_tokenizer()
    top, bottom = (end_tokens(tokenizer, logits, 2, largest) for largest in (True, False))
    assert [(t.id, t.logit) for t in top] == [(71, 3.0), (70, 2.0)]
    assert [(t.id, t.logit) for t in bottom] == [(73, -4.0), (72, -1.0)]
    assert top[0].token == tokenizer.decode([71])
