"""Chosen latents equal the SAE's own encoding; fit moments equal their definitions."""

from typing import Any

import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.saes.read import FitMoments, encode, encode_latents, encode_with_fit
from tests.factories import D_MODEL, D_SAE

X = 3 * torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(1)) + 1


def test_chosen_latents_equal_the_full_encoding(tiny_sae: Any) -> None:
    chosen = [5, 0, 63, 17]
    whole = tiny_sae.encode(X)[:, chosen]
    found = encode_latents(tiny_sae, X, chosen)
    assert torch.allclose(found, whole, atol=1e-5)
    assert torch.equal(found > 0, whole > 0)
    assert bool((found > 0).any()) and not bool((found > 0).all())


def test_topk_is_exact_and_keeps_k(tiny_sae: Any) -> None:
    acts = encode(tiny_sae, X)
    assert torch.equal(acts, tiny_sae.encode(X))
    if tiny_sae.cfg.architecture() == "topk":
        assert int((acts > 0).sum(dim=1).max()) <= 8


def test_an_unknown_latent_names_the_range(tiny_sae: Any) -> None:
    for latent in (D_SAE, -1):
        with pytest.raises(InputError, match="latents 0 to 63"):
            encode_latents(tiny_sae, X, [0, latent])


def test_fit_moments_equal_their_definitions(tiny_sae: Any) -> None:
    fit = FitMoments()
    acts = encode_with_fit(tiny_sae, X, fit)
    x, out = X.double(), tiny_sae.decode(tiny_sae.encode(X)).detach().double()
    wanted = 1 - (x - out).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert fit.explained_variance == pytest.approx(wanted.item(), rel=1e-6)
    assert fit.l0 == pytest.approx(float((acts > 0).double().sum(dim=1).mean()))
    assert fit.residual_norm == pytest.approx(float(x.norm(dim=1).mean()))
    assert fit.n == 50


def test_chunking_does_not_matter(tiny_sae: Any) -> None:
    whole, parts = FitMoments(), FitMoments()
    encode_with_fit(tiny_sae, X, whole)
    for chunk in X.split(7):
        encode_with_fit(tiny_sae, chunk, parts)
    assert parts.explained_variance == pytest.approx(whole.explained_variance, rel=1e-6)
    assert (parts.l0, parts.n) == (whole.l0, whole.n)


def test_a_perfect_reconstruction_explains_everything_and_the_mean_nothing() -> None:
    perfect, mean = FitMoments(), FitMoments()
    perfect.add(X, X, torch.ones(50, 1))
    mean.add(X, X.mean(dim=0).expand_as(X), torch.zeros(50, 1))
    assert perfect.explained_variance == 1.0
    assert mean.explained_variance == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(InputError, match="no tokens were read"):
        _ = FitMoments().explained_variance
