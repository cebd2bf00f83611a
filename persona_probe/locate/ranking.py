"""Rank all latents of a study on its selection split, arms averaged over seeds."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from persona_probe.context import Context
from persona_probe.data.chat import conversation
from persona_probe.data.tokens import Batch
from persona_probe.errors import InputError
from persona_probe.locate.agreement import agreement
from persona_probe.locate.attribution import gradient_scores
from persona_probe.locate.evidence import Evidence
from persona_probe.locate.rankers import candidates, score_table
from persona_probe.locate.registry import check_rankers
from persona_probe.locate.study_directions import write_directions
from persona_probe.saes.fit import require_fit
from persona_probe.saes.read import LatentMeans, conversation_batches, read_latents_at

POSITIONS = {"rise_last_prompt": "last_prompt", "rise_prompt": "prompt", "rise_response": "response"}
"""Rankers that look at positions of their own."""
BACKWARD = {"attribution", "slope"}
"""Rankers that need gradients."""


def rank(ctx: Context) -> None:
    """Write parts/rank.parquet (all latents), agreement.parquet and the directions."""
    evidence = gather(ctx)
    names = check_rankers(ctx.config.locate.rankers)
    table = score_table(evidence, names)
    if not bool(table["alive"].any()):
        raise InputError("no latent fires on the selection split: this SAE does not read this model and layer")
    write_directions(ctx, evidence)
    shown = list(dict.fromkeys(["rise", *names]))
    if len(shown) > 1:
        ctx.run.write_table("agreement.parquet", agreement(table.assign(rise_rank=table["rank"]), shown))
    ctx.run.write_table("parts/rank.parquet", table)


def use_rankers(ctx: Context, rankers: Sequence[str]) -> None:
    """Compute these rankers from now on; a table that lacks one of them is made again."""
    names = tuple(check_rankers([*rankers, *ctx.config.locate.choose_by]))
    ctx.config = replace(ctx.config, locate=replace(ctx.config.locate, rankers=names))
    table = "parts/rank.parquet"
    if ctx.run.has(table) and not {f"{n}_rank" for n in names} <= set(ctx.run.read_table(table).columns):
        with ctx.timed("locate"):
            rank(ctx)
        (ctx.run.path / "cards.json").unlink(missing_ok=True)


def gather(ctx: Context) -> Evidence:
    """Read base, incorrect and control arm on the selection split, at all positions that the rankers ask for.

    Raises:
        InputError: the SAE does not fit the base model.
    """
    config = ctx.config.locate
    talks = [conversation(r["question"], r[side]) for r in ctx.selection.rows for side in ("aligned", "misaligned")]
    groups = conversation_batches(ctx.tokenizer, talks)
    misaligned = np.tile([False, True], len(ctx.selection.rows))
    where = list(dict.fromkeys([config.positions, *(POSITIONS[r] for r in config.rankers if r in POSITIONS)]))
    base = _read(ctx, "base", groups, where)
    require_fit(base[config.positions].fit, ctx.sae, ctx.model, ctx.layer, config.minimum_explained_variance)
    attribution, slope = _gradients(ctx, groups, misaligned) if BACKWARD & set(config.rankers) else (None, None)
    return Evidence(
        base=base,
        tuned=_read(ctx, "incorrect", groups, where),
        control=_read(ctx, "correct", groups, where),
        decoder=ctx.sae.W_dec.detach().float().cpu().numpy(),
        clusters=[r["id"] for r in ctx.selection.rows for _ in range(2)],
        misaligned=misaligned,
        positions=config.positions,
        attribution=attribution,
        slope=slope,
        seed=ctx.seed,
    )


def _read(ctx: Context, arm: str, groups: list[Batch], where: list[str]) -> dict[str, LatentMeans]:
    found = []
    for seed in ctx.config.seeds if arm != "base" else ctx.config.seeds[:1]:
        with ctx.organism(arm, seed) as model:
            found.append(read_latents_at(model, ctx.sae, groups, ctx.layer, where, mixed_precision=ctx.config.bf16))
    return {name: average([one[name] for one in found]) for name in where}


def _gradients(ctx: Context, groups: list[Batch], misaligned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attribution and slope, of the incorrect organism, averaged over seeds."""
    found = []
    for seed in ctx.config.seeds:
        with ctx.organism("incorrect", seed) as model:
            found.append(
                gradient_scores(model, ctx.sae, groups, misaligned, ctx.layer, mixed_precision=ctx.config.bf16)
            )
    return np.mean([f.attribution for f in found], axis=0), np.mean([f.slope for f in found], axis=0)


def average(parts: Sequence[LatentMeans]) -> LatentMeans:
    """The mean over seeds, conversation by conversation; the fit is the first seed's."""
    return LatentMeans(
        np.mean([p.mean for p in parts], axis=0),
        np.mean([p.firing for p in parts], axis=0),
        np.max([p.maximum for p in parts], axis=0),
        np.mean([p.resid for p in parts], axis=0),
        parts[0].fit,
    )


def chosen_candidates(ctx: Context) -> list[int]:
    """The latents that the study tests for cause."""
    config, table = ctx.config.locate, ctx.run.read_table("parts/rank.parquet")
    return candidates(table, config.candidates, config.choose_by)
