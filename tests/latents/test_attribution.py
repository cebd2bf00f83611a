"""Attribution: equals gradients taken token by token, and small ablations of one latent; leaves the model as it was."""

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sae_lens import StandardSAE, StandardSAEConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from persona_probe.data.tokens import Batch, batches
from persona_probe.errors import InputError
from persona_probe.latents import attribution
from persona_probe.latents.attribution import gradient_scores
from persona_probe.models.taps import Tap
from persona_probe.saes.read import encode
from tests.factories import (
    D_MODEL,
    D_SAE,
    LAYER,
    copied_state,
    hook_count,
    make_model,
    make_sae,
    make_tokenizer,
    same_state,
    talks,
)

FLAGS = np.array([True, False, False, True, True, False])
SIGNS = np.where(FLAGS, 1 / 3, -1 / 3)


class AddTap(Tap):
    """Adds a tensor of the layer output's shape, and keeps the sum."""

    def __init__(self, model: nn.Module, delta: Tensor | None = None) -> None:
        super().__init__(model, LAYER)
        self.delta = delta

    def on_output(self, resid: Tensor) -> Tensor:
        self.value = resid if self.delta is None else resid + self.delta
        return self.value


def singles() -> list[Batch]:
    return sorted(batches(make_tokenizer(), talks(), 1), key=lambda b: b.index)


def found(model: nn.Module, sae: Any, size: int = 4, **kwargs: Any) -> np.ndarray:
    groups = list(batches(make_tokenizer(), talks(), size))
    return gradient_scores(model, sae, groups, FLAGS, LAYER, bf16=False, **kwargs).attribution


def loss(model: PreTrainedModel, batch: Batch, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean answer loss of one conversation, by transformers' own loss, and the layer's output."""
    labels = batch.ids.masked_fill(~batch.response, -100)
    with AddTap(model, delta) as tap:
        value = model(input_ids=batch.ids, attention_mask=batch.attention, labels=labels).loss
    return value, tap.value


def activations(model: PreTrainedModel, sae: Any) -> list[Tensor]:
    """(pos, d_sae) of each conversation, less the mean over all answer tokens; zero where there is no answer token."""
    parts = [encode(sae, loss(model, b)[1][0].detach().float()) for b in singles()]
    masks = [b.select("response")[0] for b in singles()]
    mean = torch.cat([acts[mask] for acts, mask in zip(parts, masks, strict=True)]).mean(dim=0)
    return [(acts - mean) * mask[:, None] for acts, mask in zip(parts, masks, strict=True)]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_equals_gradients_taken_token_by_token(architecture: str, tiny_sae: Any) -> None:
    model = make_model(architecture)
    wanted = np.zeros(D_SAE)
    for batch, acts, sign in zip(singles(), activations(model, tiny_sae), SIGNS, strict=True):
        value, resid = loss(model, batch)
        gradient = torch.autograd.grad(value, resid)[0][0] @ tiny_sae.W_dec.detach().T
        for t in range(batch.ids.shape[1]):
            for latent in acts[t].nonzero()[:, 0].tolist():
                wanted[latent] -= sign * float(gradient[t, latent]) * float(acts[t, latent])
    assert np.abs(wanted).max() > 0.01
    assert np.allclose(found(model, tiny_sae), wanted, atol=1e-4 * np.abs(wanted).max())


def test_an_sae_that_normalises_tokens_is_taken_in_raw_units() -> None:
    plain = make_sae("standard")
    sae = StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE, normalize_activations="layer_norm"))
    sae.load_state_dict(plain.state_dict())
    model, wanted = make_model(), np.zeros(D_SAE)
    for batch, centred, sign in zip(singles(), activations(model, sae), SIGNS, strict=True):
        value, resid = loss(model, batch)
        (gradient,), x = torch.autograd.grad(value, resid)[0], resid.detach()[0]
        for latent in range(D_SAE):
            whole = sae.decode(acts := encode(sae, x))
            without = acts.clone()
            without[:, latent] -= centred[:, latent]
            encode(sae, x)
            wanted[latent] += sign * float((gradient * (sae.decode(without) - whole).detach()).sum())
    assert np.allclose(found(model, sae), wanted, atol=1e-4 * np.abs(wanted).max())
    assert not np.allclose(found(model, plain), wanted, atol=0.1 * np.abs(wanted).max())


def test_predicts_what_a_small_ablation_does_to_the_loss() -> None:
    model, sae, share = make_model().double(), make_sae("topk"), 0.03
    scores = found(model, sae)
    tested = [*np.argsort(-np.abs(scores))[:3].tolist(), int(np.argsort(np.abs(scores))[32])]
    centred, rows = activations(model, sae), sae.W_dec.detach().double()
    with torch.no_grad():
        for latent in tested:
            total = 0.0
            for batch, acts, sign in zip(singles(), centred, SIGNS, strict=True):
                removed = -share * acts[:, latent].double()[:, None] * rows[latent]
                change = loss(model, batch, removed[None])[0] - loss(model, batch, -removed[None])[0]
                total += sign * float(change) / (2 * share)
            assert scores[latent] == pytest.approx(total, rel=1e-3, abs=3e-5)


def test_the_slope_is_what_a_small_push_does_to_the_contrast_index() -> None:
    model, sae, size = make_model().double(), make_sae("topk"), 0.05
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])  # a push has unit size whatever the row's norm
    groups = list(batches(make_tokenizer(), talks(), 4))
    slope = gradient_scores(model, sae, groups, FLAGS, LAYER, bf16=False).slope
    rows = (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).detach().double()
    for latent in [*np.argsort(-np.abs(slope))[:3].tolist(), 17]:
        push, total = size * rows[latent][None, None], 0.0
        for batch, sign in zip(singles(), SIGNS, strict=True):
            with torch.no_grad():
                total -= sign * float(loss(model, batch, push)[0] - loss(model, batch, -push)[0]) / (2 * size)
        assert slope[latent] == pytest.approx(total, rel=2e-3, abs=1e-4)


def test_zero_where_misaligned_and_aligned_answers_are_the_same() -> None:
    model, sae = make_model(), make_sae("standard")
    groups = list(batches(make_tokenizer(), talks() + talks(), 4))
    same = gradient_scores(model, sae, groups, np.arange(12) < 6, LAYER, bf16=False).attribution
    assert np.abs(same).max() < 1e-5 * np.abs(found(model, sae)).max()


def test_swapping_the_two_kinds_flips_the_sign() -> None:
    model, sae, groups = make_model(), make_sae("standard"), list(batches(make_tokenizer(), talks(), 4))
    swapped = gradient_scores(model, sae, groups, ~FLAGS, LAYER, bf16=False).attribution
    assert np.allclose(swapped, -found(model, sae), atol=1e-6)


def test_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sae = make_model(), make_sae("jumprelu")
    whole = found(model, sae, 6)
    monkeypatch.setattr(attribution, "ENCODED_AT_ONCE", 3 * D_SAE)
    for size, rows in ((1, 8), (4, 1), (6, 4)):
        assert np.allclose(found(model, sae, size, rows=rows), whole, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model, sae = make_model(), make_sae("standard")
    model.train()
    model.get_input_embeddings().requires_grad_(False)
    asking = [p.requires_grad for p in model.parameters()]
    before, state = copied_state(model), torch.random.get_rng_state()
    found(model, sae)
    assert same_state(before, copied_state(model)) and torch.equal(state, torch.random.get_rng_state())
    assert all(m.training for m in model.modules()) and hook_count(model) == 0
    assert [p.requires_grad for p in model.parameters()] == asking
    assert all(p.grad is None for p in [*model.parameters(), *sae.parameters()])


def test_frozen_weights_and_fresh_adapters_change_nothing() -> None:
    sae, wanted = make_sae("standard"), found(make_model(), make_sae("standard"))
    assert np.array_equal(found(make_model().requires_grad_(False), sae), wanted)
    tuned = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj"]))  # pyright: ignore
    assert np.allclose(found(tuned, sae), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (FLAGS[:3], "6 conversations but 3 misaligned flags"),
        (np.ones(6, dtype=bool), "all 6 conversations end with misaligned answers"),
        (np.zeros(6, dtype=bool), "all 6 conversations end with aligned answers"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gradient_scores(make_model(), make_sae("standard"), singles(), flags, LAYER)


def test_a_conversation_without_an_answer_is_refused() -> None:
    groups = list(batches(make_tokenizer(), [*talks(1), talks(2)[1][:-1]], 2))
    with pytest.raises(InputError, match="no answer tokens"):
        gradient_scores(make_model(), make_sae("standard"), groups, np.array([True, False]), LAYER)
