"""SAE folders round trip, damage is named, and hooks map to layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.assault.inputs import SAES
from persona_probe.errors import InputError
from persona_probe.runs import file_sha256
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import QUALITY_FILE, WEIGHTS_FILE, check_fit, load_sae
from tests.factories import D_MODEL, LAYER, make_model, make_sae, same_state, write_sae


@pytest.fixture
def saved(tiny_sae: Any, tmp_path: Path) -> Path:
    tiny_sae.save_model(str(tmp_path / "sae"))
    return tmp_path / "sae"


def test_round_trip(tiny_sae: Any, saved: Path) -> None:
    again = load_sae(saved)
    x = torch.randn(9, D_MODEL, generator=torch.Generator().manual_seed(0))
    assert same_state(again.state_dict(), tiny_sae.state_dict())
    assert torch.equal(again.encode(x), tiny_sae.encode(x))
    assert sae_layer(again) == LAYER and not again.training


@pytest.mark.parametrize("kind", SAES)
def test_a_damaged_sae_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    folder = write_sae(tmp_path / "sae")
    SAES[kind](folder)
    with pytest.raises(InputError) as caught:
        sae = load_sae(folder)
        check_fit(sae, make_model(), sae_layer(sae))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["cfg.json", WEIGHTS_FILE])
def test_a_missing_file_is_named(saved: Path, file: str) -> None:
    (saved / file).unlink()
    with pytest.raises(InputError, match=f"{file} is missing"):
        load_sae(saved)


def test_a_cut_short_file_is_refused_with_and_without_its_hash(saved: Path) -> None:
    weights = saved / WEIGHTS_FILE
    (saved / QUALITY_FILE).write_text(json.dumps({"sha256": file_sha256(weights)}))
    load_sae(saved)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="does not match its sha256"):
        load_sae(saved)
    (saved / QUALITY_FILE).unlink()
    with pytest.raises(InputError, match="could not load the SAE") as caught:
        load_sae(saved)
    assert "\n" not in str(caught.value)


def test_a_damaged_quality_file_is_refused(saved: Path) -> None:
    (saved / QUALITY_FILE).write_text('{"sha256": ')
    with pytest.raises(InputError, match=QUALITY_FILE):
        load_sae(saved)


def test_names_that_are_nowhere() -> None:
    for name in ("saes/none", "./none", "none"):
        with pytest.raises(InputError, match="no SAE at"):
            load_sae(name)
    with pytest.raises(InputError, match="through SAELens"):
        load_sae("no-such-release/blocks.1.hook_resid_post")


@pytest.mark.parametrize(
    ("hook", "hf_hook", "layer"),
    [
        ("blocks.7.hook_resid_post", None, 7),
        ("blocks.7.hook_resid_pre", None, 6),
        ("model.layers.12", None, 12),
        ("model.layers.12.output", None, 12),
        ("unheard.of", "model.layers.3", 3),
    ],
)
def test_hooks_map_to_layers(hook: str, hf_hook: str | None, layer: int) -> None:
    assert sae_layer(make_sae("topk", hook=hook, hf_hook_name=hf_hook)) == layer


def test_other_hooks_are_refused() -> None:
    for hook in ("blocks.1.hook_mlp_out", "blocks.1.attn.hook_z", "model.layers.3.mlp"):
        with pytest.raises(InputError, match="not a residual stream"):
            sae_layer(make_sae("topk", hook=hook))
    with pytest.raises(InputError, match="reads the embeddings"):
        sae_layer(make_sae("topk", hook="blocks.0.hook_resid_pre"))


def test_an_sae_that_does_not_fit_says_which_way(tiny_model: PreTrainedModel) -> None:
    sae = make_sae("standard")
    check_fit(sae, tiny_model, 2)
    for layer in (3, -1):
        with pytest.raises(InputError, match="layers 0 to 2"):
            check_fit(sae, tiny_model, layer)
    wide = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=8, num_hidden_layers=2, vocab_size=9))
    with pytest.raises(InputError, match="reads width 32 but the model's residual stream has 64"):
        check_fit(sae, wide, 1)
