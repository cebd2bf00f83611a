"""The best latent of other dictionaries under the persona latent's causal test.

A sparse autoencoder whose training text holds none of the study's data shows whether a latent is found without being
put there. One with a random decoder is a dictionary's null (arXiv 2602.14111): what the same procedure finds in it is
what a search over thousands of directions finds anyway.
"""

from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.context import Context
from persona_probe.errors import InputError
from persona_probe.latents.causal import Direction, effects_at, fall_table, falls, latent_direction
from persona_probe.latents.proof import item_differences, standing
from persona_probe.latents.rankers import candidates, score_table
from persona_probe.latents.stage import gather_all, item_table, make_sweep, persona_latent
from persona_probe.saes.hooks import PlacedSae, sae_layer
from persona_probe.saes.load import check_fit, load_sae
from persona_probe.units import Unit, make_units, writes_run

TABLE = "dictionaries.parquet"


@writes_run
def prove_dictionaries(ctx: Context) -> None:
    """Write dictionaries.parquet for a located study whose config names further dictionaries."""
    if ctx.config.locate.dictionaries:
        make_units(ctx, dictionary_units)
        write_dictionaries(ctx)


def dictionary_units(ctx: Context) -> list[Unit]:
    """One unit for each further dictionary of `locate.dictionaries`."""
    return [Unit(_part(sae), partial(prove_dictionary, ctx, sae), "locate") for sae in ctx.config.locate.dictionaries]


def _part(sae: str) -> str:
    return f"parts/dictionary-{sha256(sae.encode()).hexdigest()[:12]}.parquet"


def placed_dictionary(ctx: Context, name: str) -> PlacedSae:
    """A further dictionary of the study's layer.

    Raises:
        InputError: an SAE that cannot be loaded, or of another layer or width than the study's.
    """
    sae = load_sae(name, device=ctx.device, dtype=ctx.sae_dtype)
    if (layer := sae_layer(sae, ctx.config.layer)) != ctx.layer:
        raise InputError(f"SAE {name!r} reads layer {layer}, the study's reads {ctx.layer}: name one of the same layer")
    check_fit(sae, ctx.model, layer)
    return PlacedSae.of(sae, layer, name)


def prove_dictionary(ctx: Context, name: str) -> None:
    """Rank, choose and prove as `locate` does, with another SAE and at the persona latent's strengths.

    Raises:
        InputError: an SAE of another layer than the study's.
    """
    placed = placed_dictionary(ctx, name)
    sae, config = placed.sae, ctx.config.locate
    evidence = gather_all(ctx, [placed])[0]
    table = score_table(evidence, config.rankers)
    tested = [
        latent_direction(sae.W_dec, i, "dictionary") for i in candidates(table, config.candidates, config.choose_by)
    ]
    with ctx.base() as model:
        chosen = effects_at(
            make_sweep(ctx, model, ctx.selection), tested, _strength(ctx, "base"), f"candidates of {name}"
        )
    best = tested[int(chosen["effect"].to_numpy().argmax())]
    row = table[table["latent"] == best.latent].iloc[0]
    found = {
        "sae": name,
        "latent": best.latent,
        "explained_variance": evidence.base[config.positions].fit.explained_variance,
        "cosine": float(row["cosine"]),
        "rise": float(row["rise"]),
        "rise_rank": int(row["rank"]),
        "cosine_with_persona": _cosine(ctx, best),
        "effect_selection": float(chosen["effect"].max()),
        **_proven(ctx, best),
    }
    ctx.run.write_table(_part(name), pd.DataFrame([found]))


def _strength(ctx: Context, model: str) -> float:
    return float(ctx.run.read_table(f"parts/effects-{model}.parquet")["strength"].iloc[0])


def _cosine(ctx: Context, direction: Direction) -> float:
    """Cosine with the persona latent's decoder row."""
    own = ctx.sae.W_dec[persona_latent(ctx)].detach().float().cpu()
    return float(own @ direction.vector / (own.norm() * direction.vector.norm()))


def _proven(ctx: Context, best: Direction) -> dict[str, float]:
    """Its effects on the evaluation split: base, organism, control organism, and the differences in differences."""
    organism, control = ctx.config.realign.start, ctx.config.control
    items: dict[str, pd.DataFrame] = {}
    row: dict[str, float] = {}
    # the base last: in a study without a control arm it is its own control
    columns = {control: "effect_control", organism: "effect_organism", "base": "effect_base"}
    for model_name in dict.fromkeys(("base", organism, control)):
        strength = _strength(ctx, model_name)
        with ctx.organism(model_name, ctx.config.seeds[0], fold=True) as model:
            sweep = make_sweep(ctx, model, ctx.evaluation)
            effect = effects_at(sweep, [best], strength, f"best latent in {model_name}").iloc[0]
            removed = {} if model_name == "base" else falls(sweep, [[best]])
            items[model_name] = item_table(sweep, [best], strength, removed)
        row |= {f"{columns[model_name]}{end}": float(effect[f"effect{end}"]) for end in ("", "_low", "_high")}
        if model_name == organism:
            fall = fall_table(removed, sweep.items.clusters).iloc[0]
            row |= {f"ablation{end}": float(fall[f"ablation{end}"]) for end in ("", "_low", "_high")}
    differences = item_differences(items[organism], items[control] if control != "base" else None).iloc[0]
    return row | {str(name): float(value) for name, value in differences.items()}


def write_dictionaries(ctx: Context) -> None:
    """Write dictionaries.parquet: the persona latent first, then the best latent of each further dictionary.

    Each stands among the study's random latents, as the persona latent does: columns `<test>_rank` and `<test>_beyond`
    for the tests base, organism and removal_difference.
    """
    latents = ctx.run.read_table("latents.parquet")
    persona = latents[latents["persona"]].rename(columns={"rank": "place"}).assign(sae=ctx.config.sae)
    persona["rise_rank"], persona["cosine_with_persona"] = persona["place"], 1.0
    others = pd.concat([ctx.run.read_table(_part(sae)) for sae in ctx.config.locate.dictionaries], ignore_index=True)
    table = pd.concat([persona[[c for c in others.columns if c in persona.columns]], others], ignore_index=True)
    tries = int((latents["kind"] == "candidate").sum())
    places = [_places(latents, row, tries) for row in table.to_dict("records")]
    ctx.run.write_table(TABLE, pd.concat([table, pd.DataFrame(places)], axis=1))


def _places(latents: pd.DataFrame, row: dict[Any, Any], tries: int) -> dict[str, Any]:
    """Where one latent of any dictionary stands among the study's random latents."""
    compared = pd.concat([pd.DataFrame([{**row, "latent": -1, "kind": "dictionary"}]), latents], ignore_index=True)
    found: dict[str, Any] = {}
    for test in ("base", "organism", "removal_difference"):
        one = standing(compared, -1, test, tries)
        found[f"{test}_rank"] = np.nan if one is None else one.rank
        found[f"{test}_beyond"] = False if one is None else one.beyond
    return found
