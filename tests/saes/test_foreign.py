"""Other libraries' files, made here in their own layouts, give the values of the libraries' own formulas."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.models.places import Place
from persona_probe.saes.foreign import convert
from persona_probe.saes.hooks import read_place, sae_layer, write_place
from persona_probe.saes.load import load_sae
from persona_probe.saes.read import FitMoments, encode, encode_with_fit
from tests.factories import D_MODEL, D_SAE, refusal

X = 2 * torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(1)) + 0.5
K, THRESHOLD = 8, 0.7


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


ENCODER, DECODER = draw(D_SAE, D_MODEL, seed=2), draw(D_SAE, D_MODEL, seed=3)
"""Both (d_sae, d_in): rows are latents."""
B_ENC, B_DEC = draw(D_SAE, seed=4), draw(D_MODEL, seed=5)


def top(pre: Tensor) -> Tensor:
    """The K largest values of relu(pre) of each token."""
    best = pre.relu().topk(K, dim=1)
    return torch.zeros_like(pre).scatter(1, best.indices, best.values)


def check(sae: Any, acts: Tensor, offset: Tensor = B_DEC) -> None:
    """The SAE's latents are these, and its reconstruction is their sum of decoder rows and the offset."""
    fit, out = FitMoments(), acts @ DECODER + offset
    assert 0 < float((acts > 0).float().mean()) < 1
    assert torch.allclose(encode_with_fit(sae, X, fit), acts, atol=1e-5)
    assert torch.allclose(sae.decode(sae.encode(X)), out, atol=1e-5)
    wanted = 1 - (X - out).double().square().sum() / (X - X.mean(dim=0)).double().square().sum()
    assert fit.explained_variance == pytest.approx(wanted.item(), rel=1e-4)


# --- EleutherAI sparsify


def sparsify(folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"activation": "topk", "expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": K}
    config |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_MODEL}
    (folder / "cfg.json").write_text(json.dumps(config | settings))
    (folder.parent / "config.json").write_text(json.dumps({"model": "HuggingFaceTB/SmolLM2-135M", "ctx_len": 2048}))
    state = {"encoder.weight": ENCODER, "encoder.bias": B_ENC, "W_dec": DECODER, "b_dec": B_DEC}
    save_file(state, folder / "sae.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("layers.10", Place(10)),
        ("layers.10.mlp", Place(10, "mlp.output")),
        ("h.3", Place(3)),
    ],
)
def test_sparsify(tmp_path: Path, name: str, place: Place) -> None:
    sae = load_sae(sparsify(tmp_path / "run" / name))
    check(sae, top((X - B_DEC) @ ENCODER.T + B_ENC))
    assert read_place(sae) == place and sae.cfg.metadata.model_name == "HuggingFaceTB/SmolLM2-135M"
    assert not sae.training


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"activation": "groupmax"}, "activation 'groupmax'"),
        ({"signed": True}, "signed latents"),
        ({"transcode": True}, "a sparsify transcoder"),
    ],
)
def test_sparsify_settings_that_are_not_supported(tmp_path: Path, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=what) as caught:
        load_sae(sparsify(tmp_path / "layers.1", **settings))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_layer_in_its_name_asks_for_it(tmp_path: Path) -> None:
    sae = load_sae(sparsify(tmp_path / "best"))
    with pytest.raises(InputError, match="names no hook: give the layer yourself"):
        sae_layer(sae)
    assert sae_layer(sae, 4) == 4


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    folder = sparsify(tmp_path / "layers.1")
    content = (folder / "sae.safetensors").read_bytes()
    (folder / "sae.safetensors").write_bytes(content[:-40])
    with pytest.raises(InputError, match=r"could not read the SAE in .*fetch it again") as caught:
        load_sae(folder)
    assert "\n" not in str(caught.value)


# --- Gemma Scope


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", Place(20)),
        ("gemma-scope-9b-it-mlp/layer_9/width_16k/average_l0_1", Place(9, "mlp_out")),
        ("gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_1", Place(3, "attn_z")),
    ],
)
def test_gemma_scope(tmp_path: Path, path: str, place: Place) -> None:
    folder = tmp_path / path
    folder.mkdir(parents=True)
    threshold = draw(D_SAE, seed=6).abs()
    arrays: dict[str, Any] = {"W_enc": ENCODER.T, "W_dec": DECODER, "b_enc": B_ENC, "b_dec": B_DEC}
    made: dict[str, Any] = {k: v.numpy() for k, v in (arrays | {"threshold": threshold}).items()}
    np.savez(folder / "params.npz", **made)
    sae = load_sae(folder)
    pre = X @ ENCODER.T + B_ENC
    check(sae, pre.relu() * (pre > threshold))
    assert read_place(sae) == place and "gemma-2" in sae.cfg.metadata.model_name


def test_gemma_scope_never_unpickles(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match=r"could not read the SAE in .*allow_pickle=False"):
        load_sae(tmp_path)


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_transcoders(tmp_path: Path, skip: bool) -> None:
    hooks = {"hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output"}
    hooks["hf_hook_point_out"] = "model.layers.5.post_feedforward_layernorm.output"
    (tmp_path / "config.json").write_text(json.dumps({"model_name": "google/gemma-3-270m-it", **hooks}))
    threshold, linear = draw(D_SAE, seed=6).abs(), draw(D_MODEL, D_MODEL, seed=7)
    state = {"w_enc": ENCODER.T.contiguous(), "w_dec": DECODER, "b_enc": B_ENC, "b_dec": B_DEC, "threshold": threshold}
    save_file(state | ({"affine_skip_connection": linear} if skip else {}), tmp_path / "params.safetensors")
    sae, fit = load_sae(tmp_path), FitMoments()
    assert write_place(sae) == Place(5, "post_feedforward_layernorm.output")
    pre, target = X @ ENCODER.T + B_ENC, X.flip(0)
    acts = pre.relu() * (pre > threshold)
    assert torch.allclose(encode_with_fit(sae, X, fit, target), acts, atol=1e-5)
    out = acts @ DECODER + B_DEC + (X @ linear if skip else 0)
    wanted = 1 - (target - out).double().square().sum() / (target - target.mean(dim=0)).double().square().sum()
    assert fit.explained_variance == pytest.approx(wanted.item(), rel=1e-4)


# --- dictionary_learning

LINEAR = {"encoder.weight": ENCODER, "encoder.bias": B_ENC, "decoder.weight": DECODER.T.contiguous()}
MATRICES = {"W_enc": ENCODER.T.contiguous(), "W_dec": DECODER, "b_enc": B_ENC, "b_dec": B_DEC}
GATES = {"r_mag": draw(D_SAE, seed=8), "gate_bias": draw(D_SAE, seed=9), "mag_bias": draw(D_SAE, seed=10)}
PER_LATENT = draw(D_SAE, seed=11).abs()
CENTRED, PLAIN = (X - B_DEC) @ ENCODER.T, X @ ENCODER.T
GATED = ((CENTRED + GATES["gate_bias"]) > 0) * (GATES["r_mag"].exp() * CENTRED + GATES["mag_bias"]).relu()
ON = (CENTRED + B_ENC).relu()
"""relu of the encoder, the input centred."""
KINDS: dict[str, tuple[dict[str, Tensor], Tensor]] = {
    "AutoEncoder": ({**LINEAR, "bias": B_DEC}, ON),
    "AutoEncoderNew": ({**LINEAR, "decoder.bias": B_DEC}, (PLAIN + B_ENC).relu()),
    "GatedAutoEncoder": (
        {"encoder.weight": ENCODER, "decoder.weight": LINEAR["decoder.weight"], "decoder_bias": B_DEC, **GATES},
        GATED,
    ),
    "JumpReluAutoEncoder": (
        {**MATRICES, "threshold": PER_LATENT},
        ((PLAIN + B_ENC) * (PLAIN + B_ENC > PER_LATENT)).relu(),
    ),
    "AutoEncoderTopK": (
        {**LINEAR, "b_dec": B_DEC, "k": torch.tensor(K), "threshold": torch.tensor(THRESHOLD)},
        top(CENTRED + B_ENC),
    ),
    "BatchTopKSAE": (
        {**LINEAR, "b_dec": B_DEC, "k": torch.tensor(K), "threshold": torch.tensor(THRESHOLD)},
        ON * (ON > THRESHOLD),
    ),
    "MatryoshkaBatchTopKSAE": (
        {
            **MATRICES,
            "k": torch.tensor(K),
            "threshold": torch.tensor(THRESHOLD),
            "group_sizes": torch.tensor([16, D_SAE - 16]),
        },
        ON * (ON > THRESHOLD),
    ),
}


def dictionary(folder: Path, kind: str, state: Any, *, says_class: bool = True, submodule: str = "resid_post") -> Path:
    folder.mkdir(parents=True)
    trainer = {"dict_class": kind, "layer": 5, "activation_dim": D_MODEL, "dict_size": D_SAE, "lm_name": "tiny/model"}
    trainer |= {"submodule_name": f"{submodule}_layer_5"}
    if not says_class:
        del trainer["dict_class"]
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    torch.save(state, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_dictionary_learning_is_converted_not_loaded(tmp_path: Path, kind: str) -> None:
    state, acts = KINDS[kind]
    source, out = dictionary(tmp_path / "trainer_1", kind, state), tmp_path / "saelens"
    with pytest.raises(InputError, match=rf"run `persona-probe saes convert {source} {source}-saelens`"):
        load_sae(source)
    sae = load_sae(convert(source, out))
    check(sae, acts)
    assert sae_layer(sae) == 5 and sae.cfg.metadata.model_name == "tiny/model"
    assert torch.equal(encode(sae, X), encode(load_sae(out), X))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saelens", "trainer_1"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("AutoEncoderTopK", "BatchTopKSAE")])
def test_the_class_follows_from_the_weights_where_only_one_has_them(tmp_path: Path, kind: str) -> None:
    state, acts = KINDS[kind]
    check(load_sae(convert(dictionary(tmp_path / "a", kind, state, says_class=False), tmp_path / "b")), acts)


def test_what_conversion_cannot_know_is_asked_for(tmp_path: Path) -> None:
    state, acts = KINDS["BatchTopKSAE"]
    source = dictionary(tmp_path / "a", "", state, says_class=False, submodule="gate_proj")
    with pytest.raises(InputError, match="pass --kind AutoEncoderTopK or --kind BatchTopKSAE"):
        convert(source, tmp_path / "b")
    with pytest.raises(InputError, match=r"does not say where its SAE reads: pass --hook"):
        convert(source, tmp_path / "b", kind="BatchTopKSAE")
    with pytest.raises(InputError, match="unknown dictionary_learning class 'TopK': did you mean"):
        convert(source, tmp_path / "b", kind="TopK")
    sae = load_sae(convert(source, tmp_path / "b", kind="BatchTopKSAE", hook="blocks.2.hook_mlp_out"))
    check(sae, acts)
    assert read_place(sae) == Place(2, "mlp_out")
    with pytest.raises(InputError, match="exists: give another folder"):
        convert(source, tmp_path / "b", kind="BatchTopKSAE", hook="blocks.2.hook_mlp_out")


class Bomb:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_unrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = dictionary(tmp_path / "a", "AutoEncoderTopK", {"b_dec": Bomb(tmp_path / "exploded")})
    line = refusal(capsys)("saes", "convert", source, tmp_path / "b")
    assert "holds more than tensors, or is damaged, and is not loaded" in line
    assert not (tmp_path / "exploded").exists() and not (tmp_path / "b").exists()


def test_folders_of_other_libraries_are_converted_too(tmp_path: Path) -> None:
    source = sparsify(tmp_path / "run" / "layers.1")
    plain, sae = load_sae(source), load_sae(convert(source, tmp_path / "b"))
    assert torch.equal(encode(sae, X), encode(plain, X)) and sae_layer(sae) == 1
    with pytest.raises(InputError, match=r"holds no SAE that can be converted: it needs one of sae\.safetensors"):
        convert(tmp_path, tmp_path / "c")
    with pytest.raises(InputError, match="--kind is for dictionary_learning"):
        convert(source, tmp_path / "c", kind="AutoEncoder")
