"""The TransformerLens bridge sees the same numbers, and the study's model stays as it is."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.models.load import make_bridge
from persona_probe.models.taps import read, steer
from tests.factories import D_MODEL, LAYER, copied_state, hook_count, make_sae, same_state

IDS = torch.arange(40).reshape(2, 20) + 5


@pytest.fixture
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


def test_reading_equals_the_bridges_resid_post(tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    before = copied_state(tiny_model)
    bridge = make_bridge(tiny_model, tokenizer, None, "tiny")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(IDS, prepend_bos=False)
    for layer in range(2):
        with torch.no_grad(), read(tiny_model, layer) as tap:
            tiny_model(IDS)
        assert torch.allclose(tap.value, cache[f"blocks.{layer}.hook_resid_post"], atol=1e-5)
    assert same_state(copied_state(tiny_model), before)
    assert hook_count(tiny_model) == 0


def test_an_attached_sae_leaves_the_output(tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    sae = make_sae("topk")
    bridge = make_bridge(tiny_model, tokenizer, None, "tiny", sae=sae)
    with torch.no_grad():
        plain = tiny_model(IDS).logits
        out, cache = bridge.run_with_cache(IDS, prepend_bos=False)
        with read(tiny_model, LAYER) as tap:
            tiny_model(IDS)
    assert torch.allclose(out, plain, atol=1e-4)
    acts = cache[bridge.get_sae_hook_name(sae)]
    assert torch.allclose(acts, sae.encode(tap.value), atol=1e-4)


def test_booting_leaves_the_tokenizer(tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    before = tokenizer("hello")["input_ids"]
    make_bridge(tiny_model, tokenizer, None, "tiny")
    assert tokenizer("hello")["input_ids"] == before


def test_hooks_by_the_familiar_name_are_called(tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    bridge = make_bridge(tiny_model, tokenizer, None, "tiny")
    name = f"blocks.{LAYER}.hook_resid_post"
    with torch.no_grad():
        plain = tiny_model(IDS).logits
        zeroed = bridge.run_with_hooks(IDS, prepend_bos=False, fwd_hooks=[(name, lambda x, hook: torch.zeros_like(x))])
        with read(tiny_model, LAYER) as tap:
            tiny_model(IDS)
        with steer(tiny_model, LAYER, torch.ones(D_MODEL)):
            wanted = tiny_model(IDS).logits
        pushed = bridge.run_with_hooks(IDS, prepend_bos=False, fwd_hooks=[(name, lambda x, hook: tap.value + 1)])
    assert not torch.allclose(zeroed, plain, atol=0.1)
    assert torch.allclose(pushed, wanted, atol=1e-4)
