"""Rankers: nothing rises between a model and itself, and a planted latent comes first."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from persona_probe.data.tokens import conversation_batches
from persona_probe.latents.rankers import candidates, decoder_cosine, mean_difference, rank_table, rise
from persona_probe.models.taps import steer
from persona_probe.saes.read import LatentMeans, read_latents
from tests.factories import D_MODEL, LAYER, make_model, make_sae, make_tokenizer, talks

CLUSTERS = [f"q{n // 2}" for n in range(6)]


def measure(sae: Any, latent: int | None = None, strength: float = 12.0) -> LatentMeans:
    """Latents of the tiny model, its layer output shifted along a latent's decoder row."""
    model, groups = make_model(), conversation_batches(make_tokenizer(), talks(), 4)
    if latent is None:
        return read_latents(model, sae, groups, LAYER, "response", bf16=False)
    with steer(model, LAYER, sae.W_dec[latent].detach(), strength):
        return read_latents(model, sae, groups, LAYER, "response", bf16=False)


def table(base: LatentMeans, tuned: LatentMeans, control: LatentMeans, sae: Any) -> pd.DataFrame:
    return rank_table(base, tuned, control, sae.W_dec.detach().numpy(), CLUSTERS)


def test_a_model_against_itself_rises_by_exactly_zero(tiny_sae: Any) -> None:
    found = table(measure(tiny_sae), measure(tiny_sae), measure(tiny_sae), tiny_sae)
    zero = found[["rise", "rise_ci_low", "rise_ci_high", "rise_base", "cosine"]]
    assert (zero == 0).all().all()
    assert found["latent"].tolist() == list(range(64))


@pytest.mark.parametrize("architecture", ["standard", "topk"])
@pytest.mark.parametrize("planted", [0, 17, 63])
def test_a_planted_latent_comes_first(architecture: str, planted: int) -> None:
    sae = make_sae(architecture)
    base = measure(sae)
    found = table(base, measure(sae, planted), base, sae)
    best = found.iloc[0]
    assert (best["latent"], best["rank"], best["cosine_rank"]) == (planted, 1, 1)
    assert best["rise_ci_low"] > 0
    assert best["cosine"] == pytest.approx(1.0, abs=1e-4)
    assert candidates(found, 1) == [planted]


def test_what_the_control_does_too_cancels() -> None:
    sae = make_sae("standard")
    base, control = measure(sae), measure(sae, 9)
    model, groups = make_model(), conversation_batches(make_tokenizer(), talks(), 4)
    rows = sae.W_dec.detach()
    with steer(model, LAYER, rows[9], 12.0), steer(model, LAYER, rows[30], 8.0):
        tuned = read_latents(model, sae, groups, LAYER, "response", bf16=False)
    found = table(base, tuned, control, sae)
    assert found.iloc[0]["latent"] == 30
    assert found.sort_values("rise_base").iloc[-1]["latent"] == 9


def test_latent_means_equal_the_saes_own_encoding(tiny_sae: Any) -> None:
    found = measure(tiny_sae)
    alone = read_latents(
        make_model(),
        tiny_sae,
        conversation_batches(make_tokenizer(), talks()[2:3]),
        LAYER,
        "response",
        bf16=False,
    )
    assert np.allclose(found.mean[2], alone.mean[0], atol=1e-4)
    assert np.allclose(found.resid[2], alone.resid[0], atol=1e-4)
    assert found.mean.shape == (6, 64) and found.resid.shape == (6, D_MODEL)
    assert (found.maximum >= found.mean.max(axis=0) - 1e-5).all()
    assert ((found.firing > 0) == (found.mean > 0)).all()


def test_mean_difference_of_a_shift_is_the_shift() -> None:
    sae = make_sae("standard")
    shift = mean_difference(measure(sae, 5, 3.0), measure(sae))
    assert np.allclose(shift, 3.0 * sae.W_dec[5].detach().numpy(), atol=1e-5)


def test_decoder_cosine_known_answers() -> None:
    decoder = np.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    found = decoder_cosine(decoder, np.array([5.0, 0.0]))
    assert found == pytest.approx([1.0, 0.0, -1.0, 0.5**0.5, 0.0])
    assert not decoder_cosine(decoder, np.zeros(2)).any()


def test_rise_resamples_whole_questions() -> None:
    rng = np.random.default_rng(0)
    tuned = np.repeat(rng.normal(size=(30, 4)), 3, axis=0)
    zero = np.zeros_like(tuned)
    whole = rise(tuned, zero, [str(n // 3) for n in range(90)])
    naive = rise(tuned, zero, [str(n) for n in range(90)])
    assert np.array_equal(whole.estimate, naive.estimate)
    assert (whole.ci_high - whole.ci_low > 1.3 * (naive.ci_high - naive.ci_low)).all()
    again = rise(tuned, zero, [str(n // 3) for n in range(90)])
    assert np.array_equal(again.ci_low, whole.ci_low)


def test_candidates_take_turns_without_repeats() -> None:
    frame = pd.DataFrame({"latent": [7, 3, 5, 1], "rank": [1, 2, 3, 4], "cosine_rank": [4, 3, 2, 1]})
    assert candidates(frame, 3) == [7, 1, 3]
    assert candidates(frame, 9) == [7, 1, 3, 5]


def test_a_conversation_without_selected_tokens_is_refused() -> None:
    prompts = [c[:-1] for c in talks(2)]
    groups = conversation_batches(make_tokenizer(), prompts)
    with pytest.raises(ValueError, match="no token at positions 'response'"), torch.no_grad():
        read_latents(make_model(), make_sae("topk"), groups, LAYER, "response")
