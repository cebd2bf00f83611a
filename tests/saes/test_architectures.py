"""Every SAELens architecture, saved by SAELens itself and loaded by us: identities of encoding, decoding and scale."""

from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

from persona_probe.errors import InputError
from persona_probe.saes import read as encode_module
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import load_sae
from persona_probe.saes.read import FitMoments, add_fit, encode, encode_latents, encode_with_fit
from tests.factories import D_MODEL, D_SAE, LAYER

X = 2 * torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(1)) + 0.5
CHOSEN = [5, 0, 63, 17, 40]
K, THRESHOLD, SCALE = 8, 1.5, 0.4
# Kind: (SAELens' training class, its configuration, settings, the architecture that it is published as).
KINDS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "standard": (sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig, {}, "standard"),
    "gated": (sae_lens.GatedTrainingSAE, sae_lens.GatedTrainingSAEConfig, {}, "gated"),
    "topk": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig, {"k": K}, "topk"),
    "abstopk": (sae_lens.AbsTopKTrainingSAE, sae_lens.AbsTopKTrainingSAEConfig, {"k": K}, "abstopk"),
    "jumprelu": (sae_lens.JumpReLUTrainingSAE, sae_lens.JumpReLUTrainingSAEConfig, {}, "jumprelu"),
    "batchtopk": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig, {"k": K}, "jumprelu"),
    "matryoshka_batchtopk": (
        sae_lens.MatryoshkaBatchTopKTrainingSAE,
        sae_lens.MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": K, "matryoshka_widths": [16, D_SAE]},
        "jumprelu",
    ),
    "matching_pursuit": (
        sae_lens.MatchingPursuitTrainingSAE,
        sae_lens.MatchingPursuitTrainingSAEConfig,
        {"max_iterations": 6, "decoder_init_norm": 1.0},
        "matching_pursuit",
    ),
}
INFERENCE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
    "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
    "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": (sae_lens.AbsTopKSAE, sae_lens.AbsTopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
    "matching_pursuit": (sae_lens.MatchingPursuitSAE, sae_lens.MatchingPursuitSAEConfig, {}),
}
BATCHED = ("batchtopk", "matryoshka_batchtopk")
NORMS = ("none", "constant_norm_rescale", "layer_norm")
every_kind = pytest.mark.parametrize("kind", KINDS)


def shape(**settings: Any) -> dict[str, Any]:
    metadata = SAEMetadata(hook_name=f"blocks.{LAYER}.hook_resid_post", model_name="tiny")
    return {"d_in": D_MODEL, "d_sae": D_SAE, "device": "cpu", "metadata": metadata, **settings}


def fill(sae: Any) -> Any:
    """Random weights, with decoder rows of norms 0.5 to 1.5 (1 for matching pursuit, which needs it)."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(D_SAE, D_MODEL, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    if sae.cfg.architecture() != "matching_pursuit":
        rows *= 0.5 + torch.rand(D_SAE, 1, generator=generator)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
            if name == "W_dec":
                weight.copy_(rows)
            elif name == "W_enc":
                weight.copy_(rows.T + 0.1 * torch.randn(rows.T.shape, generator=generator))
            elif name == "threshold":
                weight.copy_(torch.rand(D_SAE, generator=generator))
    if sae.cfg.architecture() in BATCHED:
        sae.topk_threshold.fill_(THRESHOLD)
    return sae.eval()


def trained(kind: str, **settings: Any) -> Any:
    sae_class, config_class, own, _ = KINDS[kind]
    return fill(sae_class(config_class(**shape(**own, **settings))))


def published(sae: Any, folder: Path, scaler: ActivationScaler | None = None) -> Any:
    sae.save_inference_model(folder)
    if scaler is not None:
        scaler.save(str(folder / "activation_scaler.json"))
    return load_sae(folder)


def check_identities(sae: Any) -> None:
    """Full, chosen and chunked encodings agree with the SAE's own; the fit is that of its own forward pass."""
    whole = sae.encode(X).detach()
    assert torch.equal(encode(sae, X), whole)
    assert 0 < float((whole != 0).float().mean()) < 1
    chosen = encode_latents(sae, X, CHOSEN)
    assert torch.allclose(chosen, whole[:, CHOSEN], atol=1e-5)
    assert torch.equal(chosen != 0, whole[:, CHOSEN] != 0) and bool((chosen != 0).any())
    fit, alone = FitMoments(), FitMoments()
    assert torch.equal(encode_with_fit(sae, X, fit), whole)
    add_fit(sae, X, alone)
    x, out = X.double(), sae(X).detach().double()
    wanted = 1 - (x - out).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert fit.explained_variance == alone.explained_variance == pytest.approx(wanted.item(), rel=1e-6)
    assert fit.l0 == pytest.approx(float((whole != 0).double().sum(dim=1).mean()))


@every_kind
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_identities(kind: str, norm: str, apply_b_dec: bool, tmp_path: Path) -> None:
    sae = published(trained(kind, normalize_activations=norm, apply_b_dec_to_input=apply_b_dec), tmp_path)
    assert (sae.cfg.architecture(), sae_layer(sae), sae.training) == (KINDS[kind][3], LAYER, False)
    assert (sae.cfg.normalize_activations, sae.cfg.apply_b_dec_to_input) == (norm, apply_b_dec)
    check_identities(sae)


@pytest.mark.parametrize("kind", INFERENCE)
def test_inference_saes_saved_by_save_model(kind: str, tmp_path: Path) -> None:
    sae_class, config_class, own = INFERENCE[kind]
    sae = fill(sae_class(config_class(**shape(**own))))
    sae.save_model(tmp_path)
    again = load_sae(tmp_path)
    assert torch.equal(encode(again, X), sae.encode(X))
    check_identities(again)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BATCHED])
def test_a_published_sae_does_what_the_trained_one_did(kind: str, tmp_path: Path) -> None:
    sae = trained(kind)
    again = published(sae, tmp_path)
    assert torch.allclose(encode(again, X), sae.encode(X), atol=1e-5)
    assert torch.allclose(again(X), sae(X), atol=1e-5)


@pytest.mark.parametrize("kind", BATCHED)
def test_a_published_batchtopk_sae_is_a_threshold(kind: str, tmp_path: Path) -> None:
    sae = trained(kind)
    pre = ((X - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=1)
    found = encode(published(sae, tmp_path), X)
    assert torch.allclose(found, pre * (pre > THRESHOLD), atol=1e-5)


def test_topk_ranks_by_decoder_norm_where_it_was_trained_so(tmp_path: Path) -> None:
    plain, rescaled = [
        fill(sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**shape(k=K, rescale_acts_by_decoder_norm=flag))))
        for flag in (False, True)
    ]
    rescaled.save_model(tmp_path)
    found = encode(load_sae(tmp_path), X)
    pre = ((X - plain.b_dec) @ plain.W_enc + plain.b_enc) * plain.W_dec.norm(dim=1)
    top = pre.topk(K, dim=1)
    wanted = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.equal(found != 0, encode(plain, X) != 0)


@every_kind
def test_a_training_scale_is_folded_in(kind: str, tmp_path: Path) -> None:
    sae = trained(kind, normalize_activations="expected_average_only_in")
    reference = published(trained(kind), tmp_path / "reference")
    again = published(sae, tmp_path / "scaled", ActivationScaler(scaling_factor=SCALE))
    assert again.cfg.normalize_activations == "none"
    assert torch.allclose(again(X), reference(SCALE * X) / SCALE, atol=1e-4)
    assert torch.equal(encode(again, X) != 0, encode(reference, SCALE * X) != 0)
    assert not torch.allclose(again(X), reference(X), atol=0.1)
    check_identities(again)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "matching_pursuit"])
def test_a_training_whitening_is_folded_in(kind: str, tmp_path: Path) -> None:
    matrix = torch.eye(D_MODEL) + 0.1 * torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(3))
    scaler = ActivationScaler(whitening=ActivationWhitening(X.mean(dim=0), matrix, matrix.inverse()))
    reference = published(trained(kind), tmp_path / "reference")
    again = published(trained(kind, normalize_activations="covariance_whitening"), tmp_path / "white", scaler)
    assert torch.allclose(again(X), scaler.unscale(reference(scaler.scale(X))), atol=1e-4)
    check_identities(again)


@pytest.mark.parametrize("norm", ["expected_average_only_in", "covariance_whitening"])
def test_a_scale_that_is_missing_is_named(norm: str, tmp_path: Path) -> None:
    sae = trained("standard", normalize_activations=norm)
    with pytest.raises(InputError, match=rf"scaled inputs \({norm}\) but comes without the scale"):
        published(sae, tmp_path)


@pytest.mark.parametrize("kind", BATCHED)
def test_batchtopk_in_training_is_refused(kind: str, tmp_path: Path) -> None:
    sae = trained(kind)
    sae.save_model(tmp_path)
    with pytest.raises(InputError, match="save it with save_inference_model"):
        load_sae(tmp_path)
    with pytest.raises(InputError, match="per batch while it trains"):
        encode(sae, X)


def test_a_temporal_sae_is_refused(tmp_path: Path) -> None:
    temporal = sae_lens.TemporalSAE(sae_lens.TemporalSAEConfig(**shape(n_heads=1, kval_topk=K)))
    temporal.save_model(tmp_path)
    with pytest.raises(InputError, match="all earlier tokens"):
        load_sae(tmp_path)
    with pytest.raises(InputError, match="all earlier tokens"):
        encode_with_fit(temporal, X, FitMoments())


def test_half_precision_saes_give_float32(tmp_path: Path) -> None:
    sae = published(trained("gated", dtype="bfloat16"), tmp_path)
    fit = FitMoments()
    acts = encode_with_fit(sae, X, fit)
    assert sae.W_dec.dtype == torch.bfloat16 and acts.dtype == torch.float32
    assert torch.equal(acts, sae.encode(X).float())
    assert encode_latents(sae, X, CHOSEN).dtype == torch.float32
    x, out = X.double(), sae(X).detach().double()
    wanted = 1 - (x - out).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert fit.explained_variance == pytest.approx(wanted.item(), rel=1e-6)


@every_kind
def test_wide_dictionaries_are_encoded_in_small_chunks(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = published(trained(kind, normalize_activations="layer_norm"), tmp_path)
    whole, parts = FitMoments(), FitMoments()
    wanted = encode_with_fit(sae, X, whole)
    monkeypatch.setattr(encode_module, "CHUNK_VALUES", 3 * D_SAE)
    assert torch.allclose(encode_with_fit(sae, X, parts), wanted, atol=1e-5)
    assert parts.explained_variance == pytest.approx(whole.explained_variance, rel=1e-6)
