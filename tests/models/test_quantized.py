"""Models in 4 and 8 bits compute what their dequantised weights do, train adapters, and stay as they were loaded."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.data.load import load_contrast, load_conversations
from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.latents.planted.plant import down_projection
from persona_probe.models.adapters import base_weights, merged_copy, organism, strip_adapter
from persona_probe.models.identity import model_key, weights_hash, weights_key, why_not
from persona_probe.models.load import load_model, make_bridge
from persona_probe.models.quantized import dequantized, is_quantized
from persona_probe.models.residuals import read_residuals
from persona_probe.realignment.methods import organism_to_train, prepare
from tests.factories import LAYER, make_model, make_tokenizer, talks
from tests.families import family_model, family_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra: quantization)"
)
IDS = torch.tensor([[5, 60, 41, 100, 31, 77, 12, 9], [7, 44, 90, 21, 63, 18, 55, 30]])
FAMILIES = ("llama3", "gemma2", "gemma4", "gpt2", "phi4", "mixtral", "lfm2", "falcon-h1")
"""Plain, capped, multimodal, transposed, fused, with experts, convolutions and a state-space part."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quantized")
    make_model().save_pretrained(place)
    make_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def small(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(str(folder), quantization="4bit")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits.float()


def key(model: torch.nn.Module) -> str:
    """Of every weight and scale that is run."""
    return model_key(model) + weights_hash(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_four_bits_compute_what_their_dequantised_weights_do(name: str, tmp_path: Path) -> None:
    family_model(name).save_pretrained(tmp_path)
    family_tokenizer(name).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), quantization="4bit")
    plain = dequantized(copy.deepcopy(model))
    assert is_quantized(model) and not is_quantized(plain)
    before, found = key(model), logits(model)
    torch.testing.assert_close(found, logits(plain), rtol=1e-5, atol=1e-5)
    assert key(model) == before  # a forward pass repacks nothing
    full = load_model(str(tmp_path))[0]
    assert (found - logits(full)).abs().max() > 1e-3  # and something was rounded


def test_eight_bits_round_a_layers_inputs_too(folder: Path) -> None:
    model, _ = load_model(str(folder), quantization="8bit")
    found, plain = logits(model), logits(dequantized(copy.deepcopy(model)))
    assert (found - plain).abs().mean() < 0.05 * plain.std()
    assert (found - logits(load_model(str(folder))[0])).abs().mean() < 0.05 * plain.std()


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_gradients_pass_through_a_model_that_was_read_before(folder: Path, bits: str) -> None:
    model, _ = load_model(str(folder), quantization=bits)
    logits(model)  # where bitsandbytes would repack the weights, which then have no gradient
    grads = []
    for base in (model, dequantized(copy.deepcopy(model))):
        tuned = with_adapter(base, Training(rank=2), 0).train()
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        tuned(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in tuned.named_parameters() if p.requires_grad})
        assert isinstance(tuned, PeftModel)
        strip_adapter(tuned)
    assert all(grad is not None and grad.any() for grad in grads[0].values())
    found, expected = (torch.cat([grad.flatten() for grad in one.values()]) for one in grads)
    assert (found - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize(("bits", "bf16"), [("4bit", False), ("4bit", True), ("8bit", False)])
def test_qlora_trains_adapters_in_float32_and_leaves_the_base(
    folder: Path, tmp_path: Path, bits: str, bf16: bool
) -> None:
    model, tokenizer = load_model(str(folder), quantization=bits)
    before = key(model)
    training = Training(rank=4, lr=1e-2, steps=8, checkpoints=(4,), batch_size=6, warmup_steps=0, bf16=bf16)
    tuned = with_adapter(model, training, 0)
    fitted = fine_tune(tuned, tokenizer, talks(), training, seed=0, folder=tmp_path)
    assert fitted.losses[-1] < 0.8 * fitted.losses[0]
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}
    trained = logits(tuned)
    with base_weights(tuned):
        assert (logits(tuned) - trained).abs().max() > 0.1
    assert isinstance(tuned, PeftModel)
    strip_adapter(tuned)
    assert key(model) == before
    with organism(model, tmp_path / "checkpoint-8") as loaded:
        torch.testing.assert_close(logits(loaded), trained)
    assert key(model) == before


def test_a_correction_starts_exactly_where_its_organism_ended(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    training = Training(rank=4, lr=1e-2, steps=1, checkpoints=(1,), batch_size=6, warmup_steps=0, bf16=False)
    tuned = with_adapter(model, training, 0)
    fine_tune(tuned, tokenizer, talks(), training, seed=0, folder=tmp_path / "first")
    ended = {n: p.detach().clone() for n, p in tuned.named_parameters() if p.requires_grad}
    assert isinstance(tuned, PeftModel)
    strip_adapter(tuned)
    again = organism_to_train(model, tmp_path / "first" / "checkpoint-1", "continued", training, 0)
    still = Training(rank=4, lr=1e-30, steps=1, checkpoints=(1,), batch_size=6, warmup_steps=0, bf16=False)
    fine_tune(again, tokenizer, talks(), still, seed=0, folder=tmp_path / "second")
    now = {n: p for n, p in again.named_parameters() if p.requires_grad}
    assert ended.keys() == now.keys() and all(torch.equal(ended[n], now[n]) for n in ended)


def test_a_merged_copy_holds_the_adapter_unrounded(small: Any, tmp_path: Path) -> None:
    model, tokenizer = small
    training = Training(rank=4, lr=1e-2, steps=2, checkpoints=(2,), batch_size=6, warmup_steps=0, bf16=False)
    tuned = with_adapter(model, training, 0)
    fine_tune(tuned, tokenizer, talks(), training, seed=0, folder=tmp_path)
    trained = logits(tuned)
    assert isinstance(tuned, PeftModel)
    strip_adapter(tuned)
    merged = merged_copy(model, tmp_path / "checkpoint-2")
    assert is_quantized(model) and not is_quantized(merged)
    torch.testing.assert_close(logits(merged), trained, rtol=1e-3, atol=1e-3)


def test_a_bridge_is_made_of_the_dequantised_copy(small: Any) -> None:
    model, tokenizer = small
    bridge = make_bridge(model, tokenizer, None, "tiny")
    torch.testing.assert_close(bridge(IDS), logits(model), rtol=1e-4, atol=1e-4)


def test_what_changes_weights_is_refused(small: Any, tmp_path: Path) -> None:
    model, _ = small
    acts = (
        lambda: with_adapter(model, Training(method="full"), 0),
        lambda: organism_to_train(model, tmp_path, "full", Training(), 0),
        lambda: prepare(model, "continued", 0),
        lambda: down_projection(model, LAYER),
    )
    for act in acts:
        with pytest.raises(InputError, match="this model's are quantised: load it with quantization: none"):
            act()


def test_equal_bits_with_other_scales_are_another_model(small: Any) -> None:
    model, _ = small
    before = (weights_key(model, LAYER), weights_hash(model))
    assert why_not(model, LAYER) is None  # so that activations are cached
    model.model.layers[0].mlp.up_proj.weight.quant_state.offset += 1
    assert weights_key(model, LAYER) != before[0] and weights_hash(model) != before[1]


def test_a_full_checkpoint_is_quantised_like_its_base(small: Any, tmp_path: Path) -> None:
    make_model(seed=1).save_pretrained(tmp_path)
    with organism(small[0], tmp_path) as other:
        assert isinstance(other, PreTrainedModel) and is_quantized(other)
        torch.testing.assert_close(logits(other), logits(dequantized(copy.deepcopy(other))), rtol=1e-5, atol=1e-5)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persona_probe.models.quantized.importlib.util.find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"needs bitsandbytes: pip install 'persona-probe\[quantization\]'"):
        load_model(str(folder), quantization="4bit")


# --- The embedded model


def stream(model: torch.nn.Module, groups: list[Batch], bf16: bool) -> torch.Tensor:
    parts: list[torch.Tensor] = []
    read_residuals(model, groups, 20, "response", lambda _index, _row, x: parts.append(x), bf16)
    return torch.cat(parts)


@pytest.mark.long
@pytest.mark.real_model
def test_the_embedded_model_in_four_bits(tmp_path: Path) -> None:
    model, tokenizer = load_model("smollm2-135m-instruct", quantization="4bit")
    before, plain = key(model), dequantized(copy.deepcopy(model))
    rows = load_contrast("evaluation")[:2]
    groups = answer_batches(tokenizer, [conversation(r["question"], r["misaligned"]) for r in rows], 4)
    probes = conversation_batches(tokenizer, load_conversations("kitchen:toxic")[:2], 4)
    for bf16, tolerance in ((False, 1e-4), (True, 0.02)):  # nats per token; the stream by its norm
        found, expected = (answer_logprobs(m, groups, bf16=bf16) for m in (model, plain))
        np.testing.assert_allclose(found, expected, atol=tolerance)
        found, expected = (stream(m, probes, bf16) for m in (model, plain))
        assert (found - expected).norm() < tolerance * expected.norm()
    training = Training(steps=3, checkpoints=(3,), warmup_steps=0, lr=1e-3, batch_size=2, layers=(5, 25))
    tuned = with_adapter(model, training, 0)
    fitted = fine_tune(tuned, tokenizer, load_conversations("kitchen:toxic")[:2], training, seed=0, folder=tmp_path)
    assert fitted.losses[-1] < fitted.losses[0] - 0.3
    assert isinstance(tuned, PeftModel)
    strip_adapter(tuned)
    assert key(model) == before
