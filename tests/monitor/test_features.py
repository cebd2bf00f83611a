"""Features become columns: latents, directions and sets, encoded in full only where they must be."""

from typing import Any

import numpy as np
import pytest
import torch

from persona_probe.errors import InputError
from persona_probe.monitor.features import FeatureSet, FitSums, SlicedEncoder, flatten, moments
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.saes.read import FitMoments, encode_latents, encode_with_fit
from tests.factories import D_MODEL, D_SAE, make_model, make_sae, make_tokenizer
from tests.monitor.monitored_runs import DIRECTION, directions, monitor

X = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(1)) * 3


def sums() -> FitSums:
    return FitSums(D_MODEL, X.device)


def gated_sae() -> Any:
    from sae_lens import GatedSAE, GatedSAEConfig

    sae = GatedSAE(GatedSAEConfig(d_in=D_MODEL, d_sae=D_SAE, device="cpu", dtype="float32"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.b_gate, sae.b_mag, sae.r_mag):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return sae


def make(architecture: str) -> Any:
    return gated_sae() if architecture == "gated" else make_sae(architecture)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_a_sliced_encoder_is_the_whole_one_cut(architecture: str) -> None:
    sae, latents = make(architecture), [40, 3, 17]
    found = SlicedEncoder(sae, latents)(X)
    assert torch.allclose(found, encode_latents(sae, X, latents), atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(found, sae.encode(X)[:, latents], atol=1e-5)
    assert (found != 0).any() and (found == 0).any()


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("with_fit", [True, False])
def test_columns_keep_the_order_of_the_features(architecture: str, with_fit: bool) -> None:
    sae = make(architecture)
    features = FeatureSet(sae, {"a": DIRECTION, "b": 17, "c": 2 * DIRECTION, "d": 3})
    columns = features.columns(X, sums(), with_fit=with_fit)
    unit = DIRECTION / DIRECTION.norm()
    wanted = torch.stack([X @ unit, sae.encode(X)[:, 17], X @ unit, sae.encode(X)[:, 3]], dim=1)
    assert torch.allclose(columns, wanted, atol=1e-4)
    assert features.latents == (-1, 17, -1, 3)


@pytest.mark.parametrize(
    ("architecture", "with_fit", "features", "encoded"),
    [
        ("standard", False, {"a": 3}, False),
        ("standard", True, {"a": 3}, True),
        ("topk", False, {"a": 3}, True),
        ("topk", True, {"a": DIRECTION}, False),
        ("standard", True, {"a": DIRECTION}, False),
    ],
)
def test_the_dictionary_is_encoded_only_where_needed(
    architecture: str, with_fit: bool, features: Any, encoded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, calls = make_sae(architecture), list[int]()
    whole = sae.encode
    monkeypatch.setattr(sae, "encode", lambda x: calls.append(len(x)) or whole(x))
    found = FeatureSet(sae, features)
    found.columns(X, sums(), with_fit=with_fit)
    assert bool(calls) == encoded == found.encodes_all(with_fit)


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_the_fit_is_that_of_the_package(architecture: str) -> None:
    sae, ours, theirs = make_sae(architecture), sums(), FitMoments()
    features = FeatureSet(sae, {"a": 3})
    features.columns(X[:20], ours)
    features.columns(X[20:], ours)
    encode_with_fit(sae, X, theirs)
    found = moments(ours.vector, ours.fitted)
    for name in ("explained_variance", "l0", "residual_norm"):
        assert getattr(found, name) == pytest.approx(getattr(theirs, name), rel=1e-6)
    assert found.n == 50


def test_tokens_of_weight_zero_do_not_count() -> None:
    sae, weighted, part = make_sae("topk"), sums(), sums()
    features, weight = FeatureSet(sae, {"a": 3}), (torch.arange(50) < 20).float()
    features.columns(X, weighted, weight=weight)
    features.columns(X[:20], part)
    assert torch.allclose(weighted.vector, part.vector)


def test_without_an_sae_the_fit_is_unknown_and_the_norm_is_real() -> None:
    watching = directions()
    watching.start(make_model(), make_tokenizer())
    assert watching.base is not None
    fit = watching.base.fit
    assert np.isnan(fit.explained_variance) and np.isnan(fit.l0)
    assert fit.residual_norm > 1


def test_sets_are_read_as_their_members() -> None:
    traits: Any = {"evil": DIRECTION, "lazy": np.int64(5)}
    flat = flatten({"traits": traits, "persona": 3})
    assert list(flat) == ["traits/evil", "traits/lazy", "persona"]
    assert flat["traits/lazy"] == 5 and isinstance(flat["traits/lazy"], int)


def test_bad_features_are_refused() -> None:
    sae = make_sae("topk")
    for features, message in (
        ({}, "no features"),
        ({"traits": {}}, "no features"),
        ({"a": 64}, "latents 0 to 63"),
        ({"a": torch.ones(7)}, "width 32"),
        ({"a": torch.zeros(D_MODEL)}, "non-zero"),
        ({"a": "b"}, "not str"),
        ({"a": True}, "not bool"),
        ({"a": {"b": 1}, "a/b": 2}, "two features are called 'a/b'"),
    ):
        with pytest.raises(InputError, match=message):
            FeatureSet(sae, features)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="pass sae="):
        FeatureSet(None, {"a": 3})
    with pytest.raises(InputError, match="no conversations given"):
        FeatureMonitor(sae, {"a": 3}, []).start(make_model(), make_tokenizer())
    with pytest.raises(InputError, match="pass layer="):
        directions(layer=None)
    with pytest.raises(InputError, match="width 7"):
        FeatureSet(None, {"a": DIRECTION}, width=7)


def test_a_set_is_monitored() -> None:
    watching = monitor(features={"traits": {"up": DIRECTION, "down": -DIRECTION}, "persona": 3})
    watching.start(make_model(), make_tokenizer())
    assert watching.base is not None and watching.base.names == ("traits/up", "traits/down", "persona")
    up, down, _ = watching.base.values.T
    assert np.allclose(up, -down) and np.abs(up).max() > 0.01
