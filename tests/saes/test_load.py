"""What hooks mean, and what is said when an SAE, its layer or its folder is not there."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persona_probe.errors import InputError
from persona_probe.saes.hooks import hook_layer, sae_layer
from persona_probe.saes.load import folders_beside, load_sae, release_ids, split_release
from tests.factories import LAYER, make_sae


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder of two SAEs."""
    for layer in (1, 2):
        make_sae("topk", hook=f"blocks.{layer}.hook_resid_post").save_model(tmp_path / "shelf" / f"layer{layer}")
    return tmp_path / "shelf"


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("blocks.7.hook_resid_post", 7),
        ("blocks.7.hook_resid_pre", 6),
        ("blocks.7.hook_out", 7),
        ("blocks.7.hook_in", 6),
        ("model.layers.12", 12),
        ("model.layers.12.output", 12),
        ("model.layers.12.input", 11),
        ("model.language_model.layers.9.output", 9),
        ("layers.3", 3),
        ("transformer.h.5", 5),
        ("unheard.of", None),
        ("blocks.7.hook_resid_posts", None),
    ],
)
def test_spellings_of_the_residual_stream(hook: str, layer: int | None) -> None:
    assert hook_layer(hook) == layer


@pytest.mark.parametrize(
    ("hook", "what"),
    [
        ("blocks.1.hook_mlp_out", "the MLP's output"),
        ("model.layers.1.post_feedforward_layernorm.output", "the MLP's output"),
        ("blocks.1.hook_mlp_in", "the MLP's input"),
        ("blocks.1.ln2.hook_normalized", "the MLP's input"),
        ("model.layers.1.pre_feedforward_layernorm.output", "the MLP's input"),
        ("model.layers.1.mlp", "the MLP"),
        ("blocks.1.attn.hook_z", "the attention heads"),
        ("model.layers.1.self_attn.o_proj.input", "the attention heads"),
        ("blocks.1.hook_attn_out", "the attention"),
        ("blocks.1.hook_resid_mid", "the middle of a layer"),
        ("hook_embed", "the embeddings"),
        ("model.embed_tokens", "the embeddings"),
    ],
)
def test_other_places_are_refused_by_name(hook: str, what: str) -> None:
    with pytest.raises(InputError, match=f"reads {what} .*not a residual stream"):
        hook_layer(hook)


def test_the_first_layer_has_none_before_it() -> None:
    for hook in ("blocks.0.hook_resid_pre", "blocks.0.hook_in", "model.layers.0.input"):
        with pytest.raises(InputError, match="no decoder layer precedes it"):
            hook_layer(hook)


@pytest.mark.parametrize(
    ("hook", "hf_hook", "problem"),
    [
        ("blocks.4.hook_resid_post", "model.layers.5", "names two layers"),
        ("blocks.4.hook_mlp_out", "model.layers.4", "the MLP's output"),
        (None, None, "names no hook"),
        ("unheard.of", None, "'unheard.of' is no known residual stream"),
    ],
)
def test_metadata_that_does_not_settle_the_layer(hook: str | None, hf_hook: str | None, problem: str) -> None:
    sae = SimpleNamespace(cfg=make_sae("topk", hf_hook_name=hf_hook).cfg)
    sae.cfg.metadata.hook_name = hook
    with pytest.raises(InputError, match=problem):
        sae_layer(sae)


def test_both_names_of_one_layer_agree() -> None:
    assert sae_layer(make_sae("topk", hf_hook_name=f"model.layers.{LAYER}.output")) == LAYER
    assert sae_layer(make_sae("topk", hook="blocks.5.hook_resid_pre", hf_hook_name="model.layers.4")) == 4


def test_a_folder_that_is_not_there_names_its_siblings(shelf: Path) -> None:
    listed = [f"{shelf / f'layer{layer}'} (blocks.{layer}.hook_resid_post)" for layer in (1, 2)]
    assert folders_beside(shelf / "layer3") == folders_beside(shelf) == listed
    for name, problem in ((shelf / "layer3", "no SAE at"), (shelf, "is no SAE folder: cfg.json is missing")):
        with pytest.raises(InputError, match=problem) as caught:
            load_sae(name)
        assert str(caught.value).endswith(f"; there are {', '.join(listed)}")


def test_a_relative_path_is_no_hub_repository(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shelf.parents[1])
    relative = shelf.relative_to(shelf.parents[1])
    with pytest.raises(InputError, match=r"no SAE at .*; there are .*layer1 .*layer2 "):
        load_sae(relative / "layer3")
    with pytest.raises(InputError, match="no SAE at"):
        load_sae(relative / "layer1" / "cfg.json")


def test_shipped_saes_are_listed_too() -> None:
    with pytest.raises(InputError, match=r"smollm2-135m-instruct/layer20-topk32-4608 \(blocks.20.hook_resid_post\)"):
        load_sae("saes/smollm2-135m-instruct/layer5")


def test_a_release_without_that_sae_names_its_layers() -> None:
    with pytest.raises(InputError) as caught:
        load_sae("gemma-scope-2-1b-it-res/layer_12_width_16k_l0_medium")
    text = str(caught.value)
    assert "no SAE 'layer_12_width_16k_l0_medium'; it has layers 7, 13, 17, 22; did you mean" in text
    assert "'layer_22_width_16k_l0_medium'" in text and "\n" not in text
    for name in ("goodfire-llama-3.1-8b-instruct", "goodfire-llama-3.1-8b-instruct/"):
        with pytest.raises(InputError, match=r"needs an SAE's id .*; it has layers 19; known: 'layer_19'"):
            load_sae(name)


def test_an_unknown_release_names_near_ones() -> None:
    with pytest.raises(InputError, match=r"through SAELens: did you mean .*'gemma-scope-2-1b-it-res'"):
        release_ids("gemma-scope-2-1b-it-ress")


def test_hub_repositories_are_told_from_releases() -> None:
    assert split_release("someone/some-saes/layer_4/topk") == ("someone/some-saes", "layer_4/topk")
    sae_id = "layer_9/width_16k/canonical"
    assert split_release(f"gemma-scope-9b-it-res-canonical/{sae_id}") == ("gemma-scope-9b-it-res-canonical", sae_id)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_cfg_is_named(shelf: Path, content: str) -> None:
    (shelf / "layer1" / "cfg.json").write_text(content)
    with pytest.raises(InputError, match=r"cfg.json is damaged"):
        load_sae(shelf / "layer1")
    with pytest.raises(InputError, match="no SAE at"):
        load_sae(shelf / "layer3")


def test_a_cfg_from_before_saelens_6_loads(shelf: Path) -> None:
    path = shelf / "layer1" / "cfg.json"
    new: dict[str, Any] = json.loads(path.read_text())
    old = {key: new[key] for key in ("d_in", "d_sae", "dtype")}
    old |= {"hook_point": "blocks.1.hook_resid_pre", "normalize_activations": False, "architecture": "standard"}
    path.write_text(json.dumps(old | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 8}}))
    sae = load_sae(shelf / "layer1")
    assert (sae.cfg.architecture(), sae.cfg.k, sae_layer(sae)) == ("topk", 8, 0)
