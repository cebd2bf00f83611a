"""The releases that fit chat models, as made-up files in their own layout, built by SAELens' own loaders.

Only the download is replaced. Widths are small where a release's files say them; where SAELens' registry does, its
`config_overrides` make them small.
"""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from safetensors.torch import save_file
from torch import Tensor

from persona_probe.errors import InputError
from persona_probe.models.places import Place
from persona_probe.saes.hooks import hook_layer, read_place, sae_layer, write_place
from persona_probe.saes.load import check_fit, load_sae, release_ids
from persona_probe.saes.read import FitMoments, encode, encode_latents, encode_with_fit
from tests.factories import D_MODEL, D_SAE, LAYER, make_model, make_sae

X = 2 * torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(1)) + 0.5
GEMMA_3 = {
    "270m": (5, 9, 12, 15),
    "1b": (7, 13, 17, 22),
    "4b": (9, 17, 22, 29),
    "12b": (12, 24, 31, 41),
    "27b": (16, 31, 40, 53),
}
ANDYRDT = {
    "qwen2.5-7b-instruct-andyrdt": ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-it"),
    "llama-3.1-8b-instruct-andyrdt": ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1-8b-it"),
}
ANDYRDT_LAYERS = (3, 7, 11, 15, 19, 23, 27)
GOODFIRE = "goodfire-llama-3.1-8b-instruct"
GEMMA_2 = "gemma-scope-9b-it-res-canonical"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that SAELens takes for the hub: files at repository/path."""

    def download(
        repo_id: str,
        filename: str,
        subfolder: str | None = None,
        force_download: bool = False,
        revision: str | None = None,
    ) -> str:
        path = tmp_path / repo_id / (subfolder or "") / filename
        if not path.is_file():
            raise LocalEntryNotFoundError(f"no {filename} in {repo_id}")
        return str(path)

    def get_range(url: str, headers: dict[str, str]) -> SimpleNamespace:
        repository, _, file = url.removeprefix("https://huggingface.co/").partition("/resolve/main/")
        first, last = headers["Range"].removeprefix("bytes=").split("-")
        content = (tmp_path / repository / unquote(file)).read_bytes()
        return SimpleNamespace(content=content[int(first) : int(last) + 1])

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "_get_with_rate_limit_retry", get_range)
    return tmp_path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small widths for the releases whose widths SAELens knows by name."""
    for release in (GOODFIRE, GEMMA_2):
        widths = {"d_in": D_MODEL, "d_sae": D_SAE}
        monkeypatch.setattr(get_pretrained_saes_directory()[release], "config_overrides", widths)


def weights(seed: int = 0) -> dict[str, Tensor]:
    """Encoder (d_in, d_sae), decoder (d_sae, d_in), both biases and thresholds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "w_enc": draw(D_MODEL, D_SAE) / 4,
        "w_dec": draw(D_SAE, D_MODEL) / 4,
        "b_enc": 0.1 * draw(D_SAE),
        "b_dec": 0.1 * draw(D_MODEL),
        "threshold": torch.rand(D_SAE, generator=generator),
    }


def place(hub: Path, release: str, sae_id: str, file: str = "") -> Path:
    """Where the release's file for that id lies, its folder made."""
    entry = get_pretrained_saes_directory()[release]
    path = hub / entry.repo_id / entry.saes_map[sae_id] / file
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def check_latents_and_decoder(sae: Any, wanted: Tensor, made: dict[str, Tensor]) -> None:
    """Full and chosen latents are the wanted ones, and the fit is that of decoding them."""
    chosen, fit = [3, 0, D_SAE - 1], FitMoments()
    assert 0 < float((wanted > 0).float().mean()) < 1
    assert torch.allclose(encode(sae, X), wanted, atol=1e-5)
    assert torch.allclose(encode_latents(sae, X, chosen), wanted[:, chosen], atol=1e-5)
    encode_with_fit(sae, X, fit)
    out = wanted @ made["w_dec"] + made["b_dec"]
    error = (X - out).double().square().sum() / (X - X.mean(dim=0)).double().square().sum()
    assert fit.explained_variance == pytest.approx(1 - error.item(), rel=1e-4)


def jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return pre.relu() * (pre > threshold)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(("size", "layer"), [(size, layer) for size, layers in GEMMA_3.items() for layer in layers])
def test_gemma_scope_2(hub: Path, size: str, layer: int, with_config: bool) -> None:
    release, sae_id, made = f"gemma-scope-2-{size}-it-res", f"layer_{layer}_width_16k_l0_medium", weights()
    if with_config:
        config = {"architecture": "jump_relu", "model_name": f"google/gemma-3-{size}-it"}
        config["hf_hook_point_in"] = f"model.layers.{layer}.output"
        place(hub, release, sae_id, "config.json").write_text(json.dumps(config))
    save_file(made, place(hub, release, sae_id, "params.safetensors"))
    sae = load_sae(f"{release}/{sae_id}")
    assert (sae_layer(sae), sae.cfg.architecture()) == (layer, "jumprelu")
    assert sae.cfg.metadata.hf_hook_name == f"model.layers.{layer}.output"
    assert sae.cfg.metadata.model_name == f"google/gemma-3-{size}-it"
    check_latents_and_decoder(sae, jump(X @ made["w_enc"] + made["b_enc"], made["threshold"]), made)


@pytest.mark.parametrize("size", GEMMA_3)
def test_gemma_scope_2_layers(size: str) -> None:
    ids = release_ids(f"gemma-scope-2-{size}-it-res")
    assert {int(sae_id.split("_")[1]) for sae_id in ids} == set(GEMMA_3[size])


def save_dictionary_learning(hub: Path, release: str, layer: int, kind: str, made: dict[str, Tensor]) -> str:
    """Files as the dictionary_learning library writes them; returns `release/sae_id`."""
    sae_id = f"resid_post_layer_{layer}_trainer_1"
    trainer = {"dict_class": kind, "layer": layer, "activation_dim": D_MODEL, "dict_size": D_SAE, "k": 8}
    config = {"trainer": {**trainer, "lm_name": ANDYRDT[release][0]}, "buffer": {"ctx_len": 1024}}
    place(hub, release, sae_id, "config.json").write_text(json.dumps(config))
    state = {
        "encoder.weight": made["w_enc"].T.contiguous(),
        "decoder.weight": made["w_dec"].T.contiguous(),
        "encoder.bias": made["b_enc"],
        "b_dec": made["b_dec"],
        "k": torch.tensor(8),
        "threshold": torch.tensor(0.7),
    }
    torch.save(state, place(hub, release, sae_id, "ae.pt"))
    return f"{release}/{sae_id}"


@pytest.mark.parametrize("release", ANDYRDT)
@pytest.mark.parametrize("layer", ANDYRDT_LAYERS)
def test_andyrdt_batchtopk(hub: Path, release: str, layer: int) -> None:
    made = weights()
    sae = load_sae(save_dictionary_learning(hub, release, layer, "BatchTopKSAE", made))
    assert (sae_layer(sae), sae.cfg.architecture()) == (layer, "jumprelu")
    model, neuronpedia = ANDYRDT[release]
    assert sae.cfg.metadata.model_name == model.split("/")[1]
    assert sae.cfg.metadata.neuronpedia_id == f"{neuronpedia}/{layer}-resid-post-aa"
    check_latents_and_decoder(sae, jump((X - made["b_dec"]) @ made["w_enc"] + made["b_enc"], 0.7), made)


def test_andyrdt_topk(hub: Path) -> None:
    made = weights()
    sae = load_sae(save_dictionary_learning(hub, "qwen2.5-7b-instruct-andyrdt", 15, "AutoEncoderTopK", made))
    assert (sae_layer(sae), sae.cfg.architecture(), sae.cfg.k) == (15, "topk", 8)
    top = ((X - made["b_dec"]) @ made["w_enc"] + made["b_enc"]).topk(8, dim=1)
    wanted = torch.zeros(len(X), D_SAE).scatter(1, top.indices, top.values.relu())
    check_latents_and_decoder(sae, wanted, made)


@pytest.mark.parametrize("release", ANDYRDT)
def test_andyrdt_layers(release: str) -> None:
    assert release_ids(release) == [f"resid_post_layer_{layer}_trainer_1" for layer in ANDYRDT_LAYERS]


def save_goodfire(hub: Path, made: dict[str, Any]) -> str:
    state = {
        "encoder_linear.weight": made["w_enc"].T,
        "encoder_linear.bias": made["b_enc"],
        "decoder_linear.weight": made["w_dec"].T,
        "decoder_linear.bias": made["b_dec"],
    }
    torch.save(state, place(hub, GOODFIRE, "layer_19"))
    return f"{GOODFIRE}/layer_19"


@pytest.mark.usefixtures("small")
def test_goodfire(hub: Path) -> None:
    made = weights()
    sae = load_sae(save_goodfire(hub, made))
    assert (sae_layer(sae), sae.cfg.architecture()) == (19, "standard")
    check_latents_and_decoder(sae, (X @ made["w_enc"] + made["b_enc"]).relu(), made)


@pytest.mark.long
def test_goodfire_at_its_real_width(hub: Path) -> None:
    """Weights that vary along one axis only are stored and loaded as views of one row: 2 GB for nothing."""
    d_in, d_sae, chosen = 4096, 65536, [0, 40000, 65535]
    column, bias = torch.linspace(-1, 1, d_sae), torch.linspace(2, 3, d_sae)
    row, zeros = torch.ones(d_sae, 1).expand(d_sae, d_in), torch.zeros(d_in)
    made = {"w_enc": column[None].expand(d_in, d_sae), "w_dec": row, "b_enc": bias, "b_dec": zeros}
    sae = load_sae(save_goodfire(hub, made))
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae_layer(sae)) == (d_in, d_sae, 19)
    x = torch.randn(3, d_in, generator=torch.Generator().manual_seed(0))
    wanted = (x.sum(dim=1)[:, None] * column[chosen] + bias[chosen]).relu()
    assert torch.allclose(encode_latents(sae, x, chosen), wanted, rtol=1e-3, atol=1e-3)


class Bomb:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("switch", ["TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_pickle_with_code_is_refused_unrun(hub: Path, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(switch, "1")  # the second would let torch unpickle where nobody says otherwise
    torch.save({"encoder_linear.weight": Bomb(hub / "exploded")}, place(hub, GOODFIRE, "layer_19"))
    with pytest.raises(InputError, match=r"could not load SAE .* through SAELens") as caught:
        load_sae(f"{GOODFIRE}/layer_19")
    assert "\n" not in str(caught.value) and not (hub / "exploded").exists()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("layer", [9, 20, 31])
def test_gemma_scope_9b_it(hub: Path, layer: int) -> None:
    sae_id, made = f"layer_{layer}/width_16k/canonical", weights()
    arrays: dict[str, Any] = {key.replace("w_", "W_"): value.numpy() for key, value in made.items()}
    np.savez(place(hub, GEMMA_2, sae_id, "params.npz"), **arrays)
    sae = load_sae(f"{GEMMA_2}/{sae_id}")
    assert (sae_layer(sae), sae.cfg.architecture()) == (layer, "jumprelu")
    assert (sae.cfg.normalize_activations, sae.cfg.apply_b_dec_to_input) == ("none", False)
    assert sae.cfg.metadata.neuronpedia_id == f"gemma-2-9b-it/{layer}-gemmascope-res-16k"
    check_latents_and_decoder(sae, jump(X @ made["w_enc"] + made["b_enc"], made["threshold"]), made)


@pytest.mark.parametrize(
    ("release", "sae_id", "widths"),
    [(GOODFIRE, "layer_19", (4096, 65536)), (GEMMA_2, "layer_9/width_16k/canonical", (3584, 16384))],
)
def test_widths_by_name(release: str, sae_id: str, widths: tuple[int, int]) -> None:
    config = loaders.load_sae_config_from_huggingface(release, sae_id)
    assert (config["d_in"], config["d_sae"]) == widths


def test_every_release_that_is_known_by_name_maps_or_says_why() -> None:
    """Releases whose configuration SAELens builds without a file: the hook's layer is the path's."""
    mapped, refused = 0, 0
    for release, entry in get_pretrained_saes_directory().items():
        if entry.conversion_func not in ("gemma_2", "qwen_scope", "deepseek_r1", "goodfire"):
            continue
        for sae_id, path in entry.saes_map.items():
            hook = loaders.load_sae_config_from_huggingface(release, sae_id)["metadata"]["hook_name"]
            if entry.repo_id.endswith(("-mlp", "-att")) or "embedding" in path:
                with pytest.raises(InputError, match="not a residual stream"):
                    hook_layer(hook)
                refused += 1
            else:
                layer = re.search(r"(?:layer_?|-l)(\d+)", path)
                assert layer and hook_layer(hook) == int(layer[1])
                mapped += 1
    assert mapped > 300 and refused > 100


@pytest.mark.parametrize(
    ("release", "folder", "what"),
    [("mlp", "mlp_out", "the MLP's output"), ("att", "attn_out", "the attention heads")],
)
def test_saes_of_other_places_are_refused(hub: Path, release: str, folder: str, what: str) -> None:
    release, sae_id = f"gemma-scope-2-1b-it-{release}", "layer_13_width_16k_l0_big"
    assert get_pretrained_saes_directory()[release].saes_map[sae_id].startswith(folder)
    save_file(weights(), place(hub, release, sae_id, "params.safetensors"))
    sae = load_sae(f"{release}/{sae_id}")
    with pytest.raises(InputError, match=f"reads {what} .*not a residual stream"):
        sae_layer(sae)


@pytest.mark.parametrize("affine", [False, True])
def test_a_transcoder_reads_after_one_norm_and_writes_after_another(hub: Path, affine: bool) -> None:
    release = "gemma-scope-2-1b-it-transcoders"
    ids = [i for i in release_ids(release) if "layer_13_width_16k" in i and ("affine" in i) == affine]
    made = weights()
    skip = torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(5)) / 8
    save_file(
        made | ({"affine_skip_connection": skip} if affine else {}), place(hub, release, ids[0], "params.safetensors")
    )
    sae = load_sae(f"{release}/{ids[0]}")
    assert read_place(sae) == Place(13, "pre_feedforward_layernorm.output")
    assert write_place(sae) == Place(13, "post_feedforward_layernorm.output")
    wanted, fit = jump(X @ made["w_enc"] + made["b_enc"], made["threshold"]), FitMoments()
    target = X.flip(0)
    assert torch.allclose(encode_with_fit(sae, X, fit, target), wanted, atol=1e-5)
    assert torch.allclose(encode_latents(sae, X, [3, 0]), wanted[:, [3, 0]], atol=1e-5)
    out = wanted @ made["w_dec"] + made["b_dec"] + (X @ skip if affine else 0)
    error = (target - out).double().square().sum() / (target - target.mean(dim=0)).double().square().sum()
    assert fit.explained_variance == pytest.approx(1 - error.item(), rel=1e-4)
    for refused in (lambda: sae_layer(sae), lambda: sae_layer(sae, 13), lambda: encode_with_fit(sae, X, FitMoments())):
        with pytest.raises(InputError, match=r"not a residual stream|reads one place and writes another"):
            refused()


def test_a_missing_file_on_the_hub_is_one_line(hub: Path) -> None:
    with pytest.raises(InputError, match=r"through SAELens: no .*config\.json in andyrdt/saes-qwen2.5-7b-instruct"):
        load_sae("qwen2.5-7b-instruct-andyrdt/resid_post_layer_3_trainer_1")


@pytest.mark.filterwarnings("ignore:norm_scaling_factor not found")
def test_a_scale_that_the_registry_lacks_is_named(hub: Path) -> None:
    sae = make_sae("standard")
    sae.cfg.normalize_activations = "expected_average_only_in"
    sae.save_model(hub / "someone" / "some-saes" / "scaled")
    with pytest.raises(InputError, match="comes without the scale"):
        load_sae("someone/some-saes/scaled")


def test_a_saelens_folder_on_the_hub_loads_and_fits(hub: Path) -> None:
    made = make_sae("topk")
    made.save_model(hub / "someone" / "some-saes" / "deep" / "topk")
    sae = load_sae("someone/some-saes/deep/topk")
    check_fit(sae, make_model(), sae_layer(sae))
    assert sae_layer(sae) == LAYER and torch.equal(encode(sae, X), made.encode(X))
