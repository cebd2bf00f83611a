"""The world's sparse autoencoder (SAE): trained on chats of every speaker by this package's own trainer."""

import json
from dataclasses import asdict
from pathlib import Path

from persona_probe.files import read_json
from persona_probe.saes.sae_training import train_sae
from persona_probe.saes.stream import SaeConfig, TextConfig
from persona_probe.world.folder import World
from persona_probe.world.transformer import SIZES

CHATS = 3000
"""Chats of its text; with the special tokens about 170,000 tokens."""


def sae_recipe(
    world: World,
    layer: int | None = None,
    d_sae: int = 384,
    k: int = 12,
    tokens: int = 614_400,
    seed: int = 0,
) -> SaeConfig:
    """The recipe of a TopK SAE of the world's base model, as `sae train` takes it.

    Args:
        layer: the decoder layer whose output it reads; None is the middle one.
        d_sae: latents.
        k: latents that fire on a token.
        tokens: training tokens, counted over epochs.
    """
    layer = SIZES[world.settings["size"]].layers // 2 if layer is None else layer
    return SaeConfig(
        name=f"layer{layer}-topk{k}-{d_sae}",
        model=str(world.base_folder),
        layer=layer,
        d_sae=d_sae,
        k=k,
        tokens=tokens,
        lr=2e-3,
        buffer_tokens=100_000,
        forward_batch=128,
        dead_window=100,
        text=TextConfig(parts=(), world=CHATS),
        special_tokens=True,
        seed=seed,
    )


def train_world_sae(
    world: World, recipe: SaeConfig | None = None, device: str = "cpu", overwrite: bool = False
) -> Path:
    """Train an SAE into the world's folder `saes/`; a finished one of this recipe and these weights is kept.

    Args:
        overwrite: replace another recipe's SAE of that name, once the new one is whole.

    Returns:
        Its folder, for `load_sae`.

    Raises:
        InputError: another recipe's SAE has the name, and not `overwrite`.
    """
    recipe = sae_recipe(world) if recipe is None else recipe
    saes = world.run.path / "saes"
    made = saes / recipe.name / "recipe.json"
    wanted, change = json.loads(json.dumps(asdict(recipe))), f"move {made.parent} elsewhere"
    if made.is_file() and read_json(made, dict, change) == wanted:
        return made.parent
    with world.run.timed("sae"):
        return train_sae(recipe, saes, device, overwrite)
