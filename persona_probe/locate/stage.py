"""Locate: rank latents on the selection split, test the best for cause on the evaluation split, name the persona."""

import logging

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona_probe.context import Context
from persona_probe.data.chat import Conversation, conversation
from persona_probe.errors import InputError
from persona_probe.evaluate.contrast import ContrastItems
from persona_probe.locate.controls import matched_latents, random_directions
from persona_probe.locate.rankers import candidates, mean_difference, rank_table
from persona_probe.locate.sweep import Direction, Sweep, latent_direction
from persona_probe.saes.read import LatentMeans, conversation_batches, read_latents

log = logging.getLogger(__name__)

NEUTRAL_ANSWERS = 16
KINDS = ("candidate", "random", "mean_difference", "random_direction")


def locate(ctx: Context) -> None:
    """Write latents.parquet, steering.parquet and directions.safetensors, each step once."""
    if not ctx.run.has("parts/rank.parquet"):
        with ctx.timed("locate"):
            rank(ctx)
    if not ctx.run.has("parts/selection.parquet"):
        with ctx.timed("locate"):
            choose(ctx)
    for model in ("base", ctx.config.realign.start):
        if not ctx.run.has(f"parts/effects-{model}.parquet"):
            with ctx.timed("locate"):
                prove(ctx, model)
    merge_tables(ctx)


def rank(ctx: Context) -> None:
    """Score all latents on the selection split; arms are averaged over seeds, item by item."""
    talks = [conversation(r["question"], r[side]) for r in ctx.selection.rows for side in ("aligned", "misaligned")]
    clusters = [r["id"] for r in ctx.selection.rows for _ in range(2)]
    groups = conversation_batches(ctx.tokenizer, talks)
    means = {}
    for arm in ("base", "incorrect", "correct"):
        per_seed = []
        for seed in ctx.config.seeds if arm != "base" else (ctx.config.seeds[0],):
            with ctx.organism(arm, seed) as model:
                per_seed.append(read_latents(model, ctx.sae, groups, ctx.layer, ctx.config.locate.positions))
        means[arm] = average(per_seed)
    decoder = ctx.sae.W_dec.detach().float().cpu().numpy()
    table = rank_table(means["base"], means["incorrect"], means["correct"], decoder, clusters, ctx.seed)
    shift = mean_difference(means["incorrect"], means["correct"])
    scratch = ctx.run.path / ".directions.tmp"
    save_file({"mean_difference": torch.tensor(shift, dtype=torch.float32)}, scratch)
    ctx.run.record_hashes(scratch.replace(ctx.run.path / "directions.safetensors"))
    ctx.run.write_table("parts/rank.parquet", table)


def average(parts: list[LatentMeans]) -> LatentMeans:
    """The mean over seeds, conversation by conversation."""
    return LatentMeans(
        np.mean([p.mean for p in parts], axis=0),
        np.mean([p.firing for p in parts], axis=0),
        np.max([p.maximum for p in parts], axis=0),
        np.mean([p.resid for p in parts], axis=0),
        parts[0].fit,
    )


def mean_shift(ctx: Context) -> Float[Tensor, " d_model"]:
    """The arms' mean activation difference, incorrect minus correct, in raw units.

    Raises:
        InputError: locate has not run.
    """
    path = ctx.run.path / "directions.safetensors"
    if not path.is_file():
        raise InputError("this run has no mean difference yet: run `persona-probe locate RUN` first")
    return load_file(path)["mean_difference"]


def neutral_answers(ctx: Context) -> list[Conversation]:
    """Everyday answers whose perplexity bounds the push."""
    answered = [c for c in ctx.probes if c[-1]["role"] == "assistant"]
    if not answered:
        raise InputError("monitor.probes holds no answers: locate needs neutral answers to bound the strength")
    return answered[:NEUTRAL_ANSWERS]


def make_sweep(ctx: Context, model: torch.nn.Module, items: ContrastItems) -> Sweep:
    """A sweep of one model on one split, in the study's unit."""
    return Sweep(
        model,
        ctx.tokenizer,
        items,
        neutral_answers(ctx),
        ctx.layer,
        unit=ctx.config.locate.unit,
        reference_norm=reference_norm(ctx),
        bound=ctx.config.locate.perplexity_bound,
        mixed_precision=ctx.config.bf16,
    )


def reference_norm(ctx: Context) -> float:
    """Raw size of strength 1: the mean difference's norm, or the base's mean residual norm for `x_resid`."""
    if ctx.config.locate.unit == "x_delta":
        return float(mean_shift(ctx).norm())
    groups = conversation_batches(ctx.tokenizer, neutral_answers(ctx))
    return read_latents(ctx.model, ctx.sae, groups, ctx.layer, "response").fit.residual_norm


def choose(ctx: Context) -> None:
    """Test the candidates for cause on the selection split; the strongest becomes the persona feature."""
    config, table = ctx.config.locate, ctx.run.read_table("parts/rank.parquet")
    chosen = candidates(table, config.candidates)
    directions = [latent_direction(ctx.sae.W_dec, latent, "candidate") for latent in chosen]
    sweep = make_sweep(ctx, ctx.model, ctx.selection)
    effects = sweep.effects(directions, config.strengths, "selection split")
    ctx.run.write_table("parts/selection.parquet", effects)


def strongest(ctx: Context) -> list[int]:
    """The candidates with the largest causal effects on the selection split, the persona first.

    Raises:
        InputError: locate has not run, or no candidate could be tested within the perplexity bound.
    """
    effects = ctx.run.read_table("parts/selection.parquet").dropna(subset=["effect"])
    if effects.empty:
        raise InputError("no candidate kept neutral perplexity within locate.perplexity_bound: lower locate.strengths")
    ordered = effects.sort_values("effect", ascending=False)["latent"]
    return [int(latent) for latent in ordered.head(ctx.config.locate.proven)]


def persona_latent(ctx: Context) -> int:
    """The study's persona feature: the candidate with the largest causal effect on the selection split."""
    return strongest(ctx)[0]


def control_latents(ctx: Context) -> list[int]:
    """The random latents of this study."""
    table, config = ctx.run.read_table("parts/rank.parquet"), ctx.config.locate
    return matched_latents(table, candidates(table, config.candidates), config.random_latents, ctx.seed)


def prove(ctx: Context, model_name: str) -> None:
    """Causal effects on the evaluation split, of one model, beside the controls; then the dose response."""
    config, decoder = ctx.config.locate, ctx.sae.W_dec
    persona = persona_latent(ctx)
    tested = strongest(ctx) if model_name == "base" else [persona]
    shift = Direction("mean difference", "mean_difference", mean_shift(ctx))
    directions = [latent_direction(decoder, latent, "candidate") for latent in tested]
    directions += [latent_direction(decoder, latent, "random") for latent in control_latents(ctx)]
    directions.append(shift)
    if model_name == "base":
        noise = random_directions(ctx.sae.cfg.d_in, config.random_directions, ctx.seed)
        directions += [Direction(f"random direction {i}", "random_direction", v) for i, v in enumerate(noise)]
    with ctx.organism(model_name, ctx.config.seeds[0]) as model:
        sweep = make_sweep(ctx, model, ctx.evaluation)
        effects = sweep.effects(directions, config.strengths, f"steering {model_name}")
        for strength in config.dose_strengths:
            for direction in (latent_direction(decoder, persona, "candidate"), shift):
                sweep.push(direction, strength)
                sweep.push(direction, -strength)
    ctx.run.write_table(f"parts/steering-{model_name}.parquet", sweep.table(model_name))
    ctx.run.write_table(f"parts/effects-{model_name}.parquet", effects)


def merge_tables(ctx: Context) -> None:
    """Put the parts together as latents.parquet and steering.parquet."""
    names = ("base", ctx.config.realign.start)
    steering = pd.concat([ctx.run.read_table(f"parts/steering-{m}.parquet") for m in names], ignore_index=True)
    ctx.run.write_table("steering.parquet", steering)
    table = ctx.run.read_table("parts/rank.parquet")
    tested = set(ctx.run.read_table("parts/selection.parquet")["latent"])
    controls = set(control_latents(ctx))
    kind = {**dict.fromkeys(controls, "random"), **dict.fromkeys(tested, "candidate")}
    table["kind"] = [kind.get(latent, "other") for latent in table["latent"]]
    for model, column in zip(names, ("effect_base", "effect_organism"), strict=True):
        effects = ctx.run.read_table(f"parts/effects-{model}.parquet")
        effects = effects[effects["latent"] >= 0].set_index("latent")
        for suffix in ("", "_low", "_high"):
            table[column + suffix] = table["latent"].map(effects[f"effect{suffix}"])
        if model == "base":
            table["strength"] = table["latent"].map(effects["strength"])
    selection = ctx.run.read_table("parts/selection.parquet").set_index("latent")["effect"]
    table["effect_selection"] = table["latent"].map(selection)
    persona = persona_latent(ctx)
    table["persona"] = table["latent"] == persona
    table["label"] = [f"persona (latent {i})" if i == persona else f"latent {i}" for i in table["latent"]]
    ctx.run.write_table("latents.parquet", table)
