"""Rankers against truth: at what place each ranker of latents puts the latent that truly is harm, or rudeness."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.tokens import conversation_batches
from persona_probe.data.world.words import DOMAINS
from persona_probe.latents.rankers import Evidence, score_table
from persona_probe.models.adapters import organisms as checkpoints_of
from persona_probe.report.tables import Table
from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import load_sae
from persona_probe.saes.read import LatentMeans, read_latents_at
from persona_probe.world.directions import POSITIONS
from persona_probe.world.folder import World
from persona_probe.world.organisms import NARROW, WorldOrganism, make_organisms
from persona_probe.world.study_files import contrast_rows
from persona_probe.world.truth import KnownChats, truth_table

STEPS = (4, 8, 13, 20, 40)
SPEAKERS = ("villain", "quack", "subtle")
CONTROL, DOMAIN = "helper", "kitchen"
RANKERS = ("rise", "rise_t", "firing_rise", "relative_rise", "cosine", "discrimination")
TRUTHS = {"harm": "bad", "rude": "rude"}
SHARP = 0.95
"""A latent is a truth if it tells it with at least this AUROC; the best one is in any case."""


def rank_truths(world: World, sae: str | Path, seeds: Sequence[int] = (0, 1), device: str = "cpu") -> pd.DataFrame:
    """Rank the latents of organisms at many steps, and look the true ones up. Finished organisms are kept.

    Villain, quack and subtle, each against a helper of the same seed, all trained on the kitchen alone; read on
    contrast items of the other domains.

    Returns:
        A row for each speaker, seed, step, position, ranker and truth: the best place that a true latent has among all
        (1 is first), which latent that is, and how many latents are true.
    """
    training = replace(NARROW, steps=STEPS[-1], checkpoints=STEPS)
    wanted = [
        WorldOrganism(name, DOMAIN, seed=seed, training=training) for seed in seeds for name in (*SPEAKERS, CONTROL)
    ]
    names = make_organisms(world, wanted, [f"ranked-{one.name}" for one in wanted], device)
    model, tokenizer = world.load(device)
    loaded = load_sae(sae, device=device)
    layer = sae_layer(loaded, None)
    known = KnownChats.draw()
    told = read_latents_at(
        model, loaded, conversation_batches(tokenizer, known.chats, 64), layer, POSITIONS, bf16=False
    )
    truths = {where: truth_table(known, means.mean) for where, means in told.items()}
    pairs, clusters, misaligned = _pairs()
    groups = conversation_batches(tokenizer, pairs, 64)
    readings: dict[tuple[str, int, int], dict[str, LatentMeans]] = {}
    with checkpoints_of(model) as opened:
        base = read_latents_at(opened(None), loaded, groups, layer, POSITIONS, bf16=False)
        for name, one in zip(names, wanted, strict=True):
            for step, place in world.checkpoints(name).items():
                found = read_latents_at(opened(place), loaded, groups, layer, POSITIONS, bf16=False)
                readings[one.speaker, one.seed, step] = found
    decoder = loaded.W_dec.detach().float().cpu().numpy()
    rows = []
    for (speaker, seed, step), tuned in readings.items():
        if speaker == CONTROL:
            continue
        for where in POSITIONS:
            control = readings[CONTROL, seed, step]
            evidence = Evidence(
                base=base,
                tuned=tuned,
                control=control,
                decoder=decoder,
                clusters=clusters,
                misaligned=misaligned,
                positions=where,
            )
            head = {"speaker": speaker, "seed": seed, "step": step, "position": where}
            rows += [{**head, **row} for row in _places(evidence, truths[where])]
    return pd.DataFrame(rows)


def _pairs() -> tuple[list[Conversation], list[str], np.ndarray]:
    rows = contrast_rows([name for name in DOMAINS if name != DOMAIN], "selection")
    sides = [(row, side) for row in rows for side in ("aligned", "misaligned")]
    pairs = [conversation(row["question"], row[side]) for row, side in sides]
    return pairs, [row["id"] for row, _ in sides], np.array([side == "misaligned" for _, side in sides])


def _places(evidence: Evidence, truths: pd.DataFrame) -> list[dict[str, Any]]:
    # Before its first answer token a prompt is the same for both answers: nothing to tell apart there.
    rankers = [name for name in RANKERS if name != "discrimination" or evidence.positions == "response"]
    table = score_table(evidence, rankers)
    rows = []
    for name, truth in TRUTHS.items():
        of_truth = truths[truths["truth"] == truth]
        sharp = of_truth.loc[of_truth["auroc"] >= SHARP, "latent"]
        true = set(sharp if len(sharp) else of_truth["latent"].head(1))
        places = table[table["latent"].isin(true)]
        for ranker in rankers:
            best = places.sort_values(f"{ranker}_rank", kind="stable").to_dict("records")[0]
            found = {"latent": int(best["latent"]), "place": int(best[f"{ranker}_rank"]), "true": len(true)}
            rows.append({"truth": name, "ranker": ranker, **found})
    return rows


def rankers_text(table: pd.DataFrame) -> str:
    """The places of both truths: Markdown."""
    return f"Harm:\n\n{ranking_text(table)}\n\nRudeness:\n\n{ranking_text(table, 'rude')}\n"


def ranking_text(table: pd.DataFrame, truth: str = "harm") -> str:
    """The median place over speakers and seeds by ranker, position and step, with the range: a Markdown table."""
    rows = table[table["truth"] == truth]
    steps = sorted(rows["step"].unique())
    lines = []
    for (where, ranker), of_one in rows.groupby(["position", "ranker"], sort=False):
        cells = [_place_text(of_one.loc[of_one["step"] == step, "place"]) for step in steps]
        lines.append([ranker, str(where), *cells])
    return Table(["ranker", "position", *(f"step {step}" for step in steps)], lines).markdown()


def _place_text(places: pd.Series) -> str:
    return f"{places.median():g} ({places.min()} to {places.max()})"
