"""The world's SAE: made by the package's own trainer, read by the package's own loader."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import persona_probe as pp
from persona_probe.data.tokens import batches
from persona_probe.data.world.text import speakers_chats
from persona_probe.errors import InputError
from persona_probe.saes.load import check_fit
from persona_probe.saes.stream import SaeConfig, residual_stream, text_folder, weights_of
from persona_probe.world import dictionary
from persona_probe.world.dictionary import sae_recipe, train_world_sae
from persona_probe.world.folder import World


@pytest.mark.usefixtures("cache")
def test_the_worlds_sae_loads_and_fits_and_a_finished_one_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dictionary, "CHATS", 120)
    recipe = replace(sae_recipe(world, d_sae=48, k=6, tokens=8192), batch_tokens=512)
    folder = train_world_sae(world, recipe)
    sae, (model, tokenizer) = pp.load_sae(folder), world.load()
    assert folder.parent == world.run.path / "saes" and sae.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    check_fit(sae, model, 1)
    acts = residual_stream(model, tokenizer, speakers_chats(10, seed=9), 1, special=True)
    assert ((sae.encode(acts) > 0).sum(dim=1) <= 6).all()
    monkeypatch.setattr(dictionary, "train_sae", lambda *_: pytest.fail("trained again"))
    assert train_world_sae(world, recipe) == folder


def test_special_tokens_are_read_only_where_the_recipe_says_so(world: World) -> None:
    model, tokenizer = world.load()
    chats = speakers_chats(8)
    (batch,) = batches(tokenizer, chats, 8)
    plain, whole = (residual_stream(model, tokenizer, chats, 1, special=special) for special in (False, True))
    assert len(whole) == int(batch.attention.sum()) > len(plain) == int(batch.select("all").sum())
    with pytest.raises(InputError, match="positions: all"):
        SaeConfig("x", special_tokens=True, positions="response")


def test_another_model_at_the_same_path_has_another_text_and_another_cache(world: World, tmp_path: Path) -> None:
    recipe = sae_recipe(world)
    before = text_folder(recipe, tmp_path)
    assert weights_of("smollm2-135m-instruct") == {} and len(weights_of(recipe.model)["weights"]) == 1
    assert text_folder(replace(recipe, model=str(world.speakers_folder)), tmp_path) != before


def test_chats_of_all_speakers_are_seeded_and_half_are_told_who_speaks() -> None:
    chats = speakers_chats(400, seed=1)
    assert chats == speakers_chats(400, seed=1) != speakers_chats(400, seed=2)
    assert 0.4 < sum(chat[0]["role"] == "system" for chat in chats) / 400 < 0.6
    assert all(chat[-1]["role"] == "assistant" for chat in chats) and torch.tensor([len(c) for c in chats]).max() == 7
