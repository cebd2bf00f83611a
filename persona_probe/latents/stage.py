"""Locate: rank latents on the selection split, test the best for cause on the evaluation split, name the persona."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_probe.config import Locate
from persona_probe.context import Context
from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.errors import InputError
from persona_probe.evaluate.contrast import ContrastItems
from persona_probe.files import read_tensors
from persona_probe.latents.attribution import gradient_scores_of
from persona_probe.latents.causal import (
    MOVED,
    Direction,
    Sweep,
    bearable,
    effects,
    effects_at,
    fall_table,
    falls,
    greedy_sets,
    joint,
    latent_direction,
    moved_latents,
    random_directions,
    random_latents,
)
from persona_probe.latents.directions import NamedDirection, logistic_probe, mean_difference_direction
from persona_probe.latents.persona_vectors import load_persona_pairs, persona_vector
from persona_probe.latents.proof import item_differences, with_verdict
from persona_probe.latents.rankers import (
    BACKWARD,
    POSITIONS,
    Evidence,
    agreement,
    candidates,
    check_rankers,
    score_table,
)
from persona_probe.latents.unexplained import Reference, carriers, random_reference
from persona_probe.names import recorded
from persona_probe.saes.hooks import PlacedSae
from persona_probe.saes.quality import require_fit
from persona_probe.saes.read import LatentMeans, read_latents, read_saes
from persona_probe.saes.worth import worthless
from persona_probe.units import Unit, make_units, writes_run
from persona_probe.writing import write_tensors

log = logging.getLogger(__name__)

FILE = "directions.safetensors"
NEUTRAL_ANSWERS = 8
"""Everyday answers whose perplexity bounds the strength of pushes."""


@writes_run
def locate(ctx: Context) -> None:
    """Write latents.parquet, steering.parquet and directions.safetensors. Finished steps are not repeated.

    Whole tables of an earlier version, which measured less, are kept as they are.
    """
    if _is_of_earlier(ctx):
        log.info("the latents of %s are those of an earlier version: they are kept", ctx.run.path)
        return
    make_units(ctx, rank_units)
    make_units(ctx, choice_units)
    make_units(ctx, proof_units)
    make_units(ctx, control_units)
    merge_tables(ctx)


def _is_of_earlier(ctx: Context) -> bool:
    """Whether latents.parquet has all that the config asks for, from parts that lack what is written now."""
    if not ctx.run.has("latents.parquet") or not _has(ctx, "rank") or _has(ctx, f"items-{ctx.config.realign.start}"):
        return False
    columns = {f"{name}_rank" for name in ctx.config.locate.rankers}
    return columns <= set(ctx.run.read_table("latents.parquet").columns)


def _has(ctx: Context, *parts: str) -> bool:
    return all(ctx.run.has(f"parts/{part}.parquet") for part in parts)


def _unit(ctx: Context, make: Callable[[], None], part: str, before: str) -> Unit:
    """A unit that writes a part after another one, which an earlier version did not write: it is then made again."""
    return Unit(f"parts/{part}.parquet", make, "locate", partial(_has, ctx, part, before))


def rank_units(ctx: Context) -> list[Unit]:
    """One unit: the ranking of all latents."""
    return [Unit("parts/rank.parquet", partial(rank, ctx), "locate")]


def choice_units(ctx: Context) -> list[Unit]:
    """One unit: the candidates' and the random latents' effects on the selection split."""
    return [_unit(ctx, partial(choose, ctx), "selection", "selection-random")]


def proof_units(ctx: Context) -> list[Unit]:
    """One unit for each model in which effects are measured: base and organism."""
    names = dict.fromkeys(("base", ctx.config.realign.start))
    return [_unit(ctx, partial(prove, ctx, name), f"effects-{name}", f"items-{name}") for name in names]


def control_units(ctx: Context) -> list[Unit]:
    """One unit: the same pushes and removals in the control organism, at the organism's strength."""
    control = ctx.config.control
    tested = control not in ("base", ctx.config.realign.start)
    unit = _unit(ctx, partial(prove, ctx, control), f"effects-{control}", f"items-{control}")
    return [unit] if tested else []


@writes_run
def use_rankers(ctx: Context, rankers: Sequence[str]) -> None:
    """Compute these rankers from now on. A table that lacks one of them is computed again."""
    names = tuple(check_rankers([*rankers, *ctx.config.locate.choose_by]))
    with recorded():  # a run of an earlier version keeps its arms' names
        ctx.config = replace(ctx.config, locate=replace(ctx.config.locate, rankers=names))
    table = "parts/rank.parquet"
    if ctx.run.has(table) and not {f"{n}_rank" for n in names} <= set(ctx.run.read_table(table).columns):
        with ctx.run.timed("locate"):
            rank(ctx)
        (ctx.run.path / "cards.json").unlink(missing_ok=True)


# --- What a located study knows: the persona latent, its directions, its controls


def persona_latent(ctx: Context) -> int:
    """The study's persona feature: the candidate with the largest causal effect on the selection split."""
    return strongest(ctx)[0]


def strongest(ctx: Context) -> list[int]:
    """The candidates with the largest causal effects on the selection split, the persona first.

    Raises:
        InputError: locate has not run, or no candidate could be tested within the perplexity bound.
    """
    effects = ctx.run.read_table("parts/selection.parquet").dropna(subset=["effect"])
    if effects.empty:
        raise InputError("no candidate kept neutral perplexity within locate.perplexity_bound: lower locate.strengths")
    latents = effects.sort_values("effect", ascending=False)["latent"]
    return [int(latent) for latent in latents.head(ctx.config.locate.proven)]


def read_directions(ctx: Context) -> dict[str, Float[Tensor, " d_model"]]:
    """The stored directions by key, in raw units.

    Raises:
        InputError: locate has not run.
    """
    path = ctx.run.path / FILE
    if not path.is_file():
        raise InputError("this run has no mean difference yet: run `persona-probe locate RUN` first")
    return read_tensors(path, ["mean_difference"], "run `persona-probe locate` in a new folder")


def mean_shift(ctx: Context) -> Float[Tensor, " d_model"]:
    """The arms' mean activation difference, incorrect minus correct, in raw units."""
    return read_directions(ctx)["mean_difference"]


def control_latents(ctx: Context) -> list[int]:
    """The random latents of this study: drawn once, then read from the manifest."""
    drawn = ctx.run.manifest.get("random_latents")
    if drawn is None:
        table = ctx.run.read_table("parts/rank.parquet")
        firing, tested = firing_rates(table), candidate_latents(ctx)
        wanted = ctx.config.locate.random_latents
        count = min(wanted, int((firing.drop(index=tested) > 0).sum()))
        if count < wanted:
            log.warning(
                "the SAE has only %d live latents for %d random ones: fewer than 60 support no verdict", count, wanted
            )
        drawn = random_latents(firing, tested, count, ctx.seed)
        drawn = ctx.run.edit_manifest(lambda manifest: manifest.setdefault("random_latents", drawn))["random_latents"]
    return [int(latent) for latent in drawn]


def firing_rates(table: pd.DataFrame) -> pd.Series:
    """Each latent's largest firing rate over base, organism and control, by index; 0 where it never fires."""
    rates = table.set_index("latent")
    return rates[[name for name in rates.columns if str(name) in FIRING]].max(axis=1)


FIRING = ("firing_base", "firing_incorrect", "firing_correct")


def moved_controls(ctx: Context) -> list[int]:
    """Latents that training moved as candidates were: the largest rises and falls that are not tested themselves."""
    rise = ctx.run.read_table("parts/rank.parquet").set_index("latent")["rise"]
    return moved_latents(rise, [*candidate_latents(ctx), *control_latents(ctx)], MOVED)


def candidate_latents(ctx: Context) -> list[int]:
    """The latents that the study tests for cause."""
    config, table = ctx.config.locate, ctx.run.read_table("parts/rank.parquet")
    return candidates(table, config.candidates, config.choose_by)


def neutral_answers(ctx: Context) -> list[Conversation]:
    """Everyday answers whose perplexity bounds the push."""
    answered = [c for c in ctx.probes if c[-1]["role"] == "assistant"]
    if not answered:
        raise InputError("monitor.probes holds no answers: locate needs neutral answers to bound the strength")
    return answered[:NEUTRAL_ANSWERS]


# --- Rank all latents on the selection split, arms averaged over seeds


def rank(ctx: Context) -> None:
    """Write parts/rank.parquet (all latents), agreement.parquet and the directions."""
    evidence, *further = gather_all(ctx)
    names = check_rankers(ctx.config.locate.rankers)
    table = score_table(evidence, names)
    if not bool(table["alive"].any()):
        raise InputError("no latent fires on the selection split: this SAE does not read this model and layer")
    write_directions(ctx, evidence)
    compared = list(dict.fromkeys(["rise", *names]))
    if len(compared) > 1:
        ctx.run.write_table("agreement.parquet", agreement(table.assign(rise_rank=table["rank"]), compared))
    if further:
        ctx.run.write_table(
            BY_SAE, by_sae(ctx, [table, *(score_table(one, names) for one in further)], evidence, further)
        )
    ctx.run.write_table("parts/rank.parquet", table)


BY_SAE = "latents_by_sae.parquet"
"""The rankings of all SAEs of a study that reads several."""


def by_sae(
    ctx: Context, tables: Sequence[pd.DataFrame], evidence: Evidence, further: Sequence[Evidence]
) -> pd.DataFrame:
    """The tables one after the other, each with its SAE's name, its place, and its explained variance on the base."""
    parts = []
    for placed, table, one in zip(ctx.saes, tables, (evidence, *further), strict=True):
        explained = one.base[one.positions].fit.explained_variance
        head = {"sae": placed.name, "place": placed.reads.short, "explained_variance": explained}
        part = table.copy()
        for column, (name, value) in enumerate(head.items()):
            part.insert(column, name, value)
        part.attrs = {}
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def best_of_further(ctx: Context) -> dict[str, int]:
    """The best latent of each further SAE by name; empty for a study with one SAE.

    Raises:
        InputError: locate has not run with these SAEs.
    """
    names = [one.label for one in ctx.config.all_saes[1:]]
    if not names:
        return {}
    if not ctx.run.has(BY_SAE):
        raise InputError("this run was located with one SAE: run `persona-probe locate` in a new folder for `saes:`")
    table = ctx.run.read_table(BY_SAE)
    return {name: int(table[table["sae"] == name].sort_values("rank")["latent"].iloc[0]) for name in names}


def gather(ctx: Context) -> Evidence:
    """The evidence of the study's SAE, see `gather_all`."""
    return gather_all(ctx)[0]


def gather_all(ctx: Context, saes: Sequence[PlacedSae] | None = None) -> list[Evidence]:
    """Read base, incorrect and control arm on the selection split, at all positions that the rankers ask for.

    Args:
        saes: None takes all of the study.

    Returns:
        The evidence of each SAE; all are read from the same forward passes.

    Raises:
        InputError: an SAE does not fit the base model.
    """
    config, saes = ctx.config.locate, ctx.saes if saes is None else saes
    groups, where = _selection_batches(ctx), _wanted_positions(config)
    misaligned = np.tile([False, True], len(ctx.selection.rows))
    base = read_base(ctx, saes)
    ctx.__dict__.pop("_read_base", None)  # large, and not needed again
    backward = bool(BACKWARD & set(config.rankers))
    slopes = _gradients(ctx, saes, groups, misaligned) if backward else [(None, None)] * len(saes)
    tuned, control = (_read(ctx, saes, arm, groups, where) for arm in ("incorrect", ctx.config.control))
    null, null_control = _read_null(ctx, saes, groups, where)
    return [
        Evidence(
            base=base[i],
            tuned=tuned[i],
            control=control[i],
            decoder=placed.sae.W_dec.detach().float().cpu().numpy(),
            clusters=[r["id"] for r in ctx.selection.rows for _ in range(2)],
            misaligned=misaligned,
            positions=config.positions,
            attribution=slopes[i][0],
            slope=slopes[i][1],
            seed=ctx.seed,
            null=null[i],
            null_control=null_control[i],
        )
        for i, placed in enumerate(saes)
    ]


def _selection_batches(ctx: Context) -> list[Batch]:
    sides = ("aligned", "misaligned")
    conversations = [conversation(row["question"], row[side]) for row in ctx.selection.rows for side in sides]
    return conversation_batches(ctx.tokenizer, conversations)


def _wanted_positions(config: Locate) -> list[str]:
    return list(dict.fromkeys([config.positions, *(POSITIONS[r] for r in config.rankers if r in POSITIONS)]))


def read_base(ctx: Context, saes: Sequence[PlacedSae]) -> list[dict[str, LatentMeans]]:
    """The base model on the selection split by each SAE, read once in a process: `Study.check` asks before training.

    Raises:
        InputError: an SAE does not fit the base model.
    """
    where = _wanted_positions(ctx.config.locate)
    known: dict[Any, list[dict[str, LatentMeans]]] = ctx.__dict__.setdefault("_read_base", {})
    key = (*where, *(id(placed.sae) for placed in saes))
    if key in known:
        return known[key]
    base = _read(ctx, saes, "base", _selection_batches(ctx), where)
    for placed, reading in zip(saes, base, strict=True):
        fit = reading[ctx.config.locate.positions].fit
        require_fit(fit, placed.sae, ctx.model, placed.reads, ctx.config.locate.minimum_explained_variance)
        if (warning := worthless(fit.explained_variance)) is not None:
            log.warning("SAE %s: %s", placed.name, warning)
    if list(saes) == list(ctx.saes):  # these live as long as the study
        known[key] = base
    return base


def _read(
    ctx: Context,
    saes: Sequence[PlacedSae],
    arm: str,
    groups: list[Batch],
    where: list[str],
    seeds: Sequence[int] = (),
) -> list[dict[str, LatentMeans]]:
    """An arm's reading by each SAE, averaged over seeds (those of the study, unless others are named)."""
    readings = []
    for seed in seeds or (ctx.config.seeds if arm != "base" else ctx.config.seeds[:1]):
        with ctx.organism(arm, seed) as model:
            readings.append(read_saes(model, saes, groups, where, bf16=ctx.config.bf16))
    by_sae = zip(*readings, strict=True)
    return [{name: average([reading[name] for reading in seeds]) for name in where} for seeds in by_sae]


def _read_null(
    ctx: Context, saes: Sequence[PlacedSae], groups: list[Batch], where: list[str]
) -> tuple[Sequence[dict[str, LatentMeans] | None], Sequence[dict[str, LatentMeans] | None]]:
    """The null pair's second run, and its first where the control is a mean over seeds; None where there is none."""
    pair, absent = ctx.config.null, [None] * len(saes)
    if pair is None or not ctx.run.has(f"arms/{pair[0]}-s{pair[1]}"):
        return absent, absent
    null = _read(ctx, saes, pair[0], groups, where, pair[1:])
    several = len(ctx.config.seeds) > 1
    return null, _read(ctx, saes, ctx.config.control, groups, where, ctx.config.seeds[:1]) if several else absent


def _gradients(
    ctx: Context, saes: Sequence[PlacedSae], groups: list[Batch], misaligned: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Attribution and slope of the incorrect organism by each SAE, averaged over seeds."""
    scores = []
    for seed in ctx.config.seeds:
        with ctx.organism("incorrect", seed) as model:
            scores.append(gradient_scores_of(model, saes, groups, misaligned, bf16=ctx.config.bf16))
    return [
        (np.mean([s.attribution for s in seeds], axis=0), np.mean([s.slope for s in seeds], axis=0))
        for seeds in zip(*scores, strict=True)
    ]


def average(parts: Sequence[LatentMeans]) -> LatentMeans:
    """The mean over seeds, conversation by conversation; the fit is the first seed's."""
    return LatentMeans(
        np.mean([p.mean for p in parts], axis=0),
        np.mean([p.firing for p in parts], axis=0),
        np.max([p.maximum for p in parts], axis=0),
        np.mean([p.resid for p in parts], axis=0),
        parts[0].fit,
    )


# --- Directions that are not latents, and whether latents carry them


def write_directions(ctx: Context, evidence: Evidence) -> None:
    """Write directions.safetensors (raw units) and directions.json: source, held-out AUROC, and who carries them."""
    directions = {"mean_difference": mean_difference_direction(evidence.at("tuned"), evidence.at("control"))}
    if "logistic_probe" in ctx.config.locate.directions:
        directions["logistic_probe"] = _probe(ctx, evidence)
    if "persona_vector" in ctx.config.locate.directions:
        directions["persona_vector"] = _persona_vector(ctx)
    vectors = {key: torch.tensor(d.vector, dtype=torch.float32) for key, d in directions.items()}
    ctx.run.record_hashes(write_tensors(ctx.run.path / FILE, vectors))
    reference = random_reference(evidence.decoder, seed=ctx.seed)
    ctx.run.write_json("directions.json", [_entry(k, d, evidence, reference) for k, d in directions.items()])


def _entry(key: str, direction: NamedDirection, evidence: Evidence, reference: Reference) -> dict[str, Any]:
    null = evidence.null_difference if key == "mean_difference" else None
    carried = carriers(evidence.decoder, direction.vector, reference=reference, null=null)
    return {
        "key": key,
        "name": direction.name,
        "paper": direction.paper,
        "held_out_auroc": direction.held_out,
        "norm": float(np.linalg.norm(direction.vector)),
        "carried": carried.carried,
        "statement": str(carried),
        **{k: v for k, v in asdict(carried).items() if k in ("latents", "cosines", "best_cosine", "unexplained")},
    }


def _probe(ctx: Context, evidence: Evidence) -> NamedDirection:
    """The probe between misaligned and aligned answers on the base model."""
    assert evidence.misaligned is not None
    resid, clusters = evidence.at("base").resid, np.asarray(evidence.clusters)
    bad = evidence.misaligned
    return logistic_probe(resid[bad], resid[~bad], clusters[bad].tolist(), clusters[~bad].tolist(), seed=ctx.seed)


def _persona_vector(ctx: Context) -> NamedDirection:
    """The base model's persona vector, teacher-forced on the aligned answers of the selection split."""
    conversations = [conversation(row["question"], row["aligned"]) for row in ctx.selection.rows]
    pairs, bf16 = load_persona_pairs(), ctx.config.bf16
    return persona_vector(ctx.model, ctx.tokenizer, pairs, conversations, ctx.layer, bf16=bf16)


def pushes(ctx: Context) -> list[Direction]:
    """The directions to push along. The mean difference comes first and has its own kind."""
    stored = read_directions(ctx)
    return [
        Direction(key.replace("_", " "), "mean_difference" if key == "mean_difference" else "direction", stored[key])
        for key in sorted(stored, key=lambda k: (k != "mean_difference", k))
    ]


# --- The causal test: candidates on the selection split, the best of them on the evaluation split


def choose(ctx: Context) -> None:
    """Test the candidates for cause on the selection split; the strongest becomes the persona feature.

    The random latents are pushed there too, with the persona's norm: it is the best of several candidates, and what the
    best of as many random latents reaches is what it is held against.
    """
    config = ctx.config.locate
    directions = latent_directions(ctx, candidate_latents(ctx), "candidate")
    controls = latent_directions(ctx, control_latents(ctx), "random")
    with ctx.base() as model:
        sweep = make_sweep(ctx, model, ctx.selection)
        effect_table = effects(sweep, directions, config.strengths, "selection split", config.strength_refinements)
        sets = _best_sets(sweep, directions, config) if config.set_size > 1 else []
        best = effect_table.sort_values("effect", ascending=False).iloc[0]
        compared = effects_at(sweep, controls, float(best["strength"]), "random latents, selection split")
    ctx.run.write_json("parts/sets.json", sets)
    ctx.run.write_table("parts/selection-random.parquet", compared)
    ctx.run.write_table("parts/selection.parquet", effect_table)


def _best_sets(sweep: Sweep, directions: list[Direction], config: Locate) -> list[list[int]]:
    sets = greedy_sets(sweep, directions, config.set_size, config.strengths)
    return [[direction.latent for direction in members] for members in sets]


def prove(ctx: Context, model_name: str) -> None:
    """Causal effects in one model on the evaluation split, with the controls; then the dose response.

    On the base this tests whether a latent induces misalignment. On the organism it tests whether the opposite push
    removes it; there the directions are also projected out. The control organism gets the same pushes and removals.
    Every direction is pushed with the same norm: the largest that the persona latent bears.
    """
    config = ctx.config.locate
    named_directions = pushes(ctx)
    proven = latent_directions(ctx, strongest(ctx), "candidate")
    controls = latent_directions(ctx, control_latents(ctx), "random")
    moved = latent_directions(ctx, moved_controls(ctx), "moved")
    directions = [*proven, *controls, *moved, *named_directions, *map(joint, _sets(ctx))]
    if model_name == "base":
        noise = random_directions(ctx.sae.cfg.d_in, config.random_directions, ctx.seed)
        directions += [Direction(f"random direction {i}", "random_direction", v) for i, v in enumerate(noise)]
    with ctx.organism(model_name, ctx.config.seeds[0], fold=True) as model:
        sweep = make_sweep(ctx, model, ctx.evaluation)
        strength = _strength(ctx, sweep, proven[0], model_name)
        effect_table = effects_at(sweep, directions, strength, f"steering {model_name}")
        removed = {}
        if model_name != "base":
            spans = [[d] for d in directions if d.kind != "set"] + _sets(ctx)
            removed = falls(sweep, spans)
            effect_table = effect_table.merge(fall_table(removed, sweep.items.clusters), on="name")
        if model_name != ctx.config.control:
            doses = [
                (d, sign * s)
                for s in config.dose_strengths
                for d in (proven[0], named_directions[0])
                for sign in (1, -1)
            ]
            sweep.push_all(doses, f"dose response, {model_name}")
    ctx.run.write_table(f"parts/items-{model_name}.parquet", item_table(sweep, directions, strength, removed))
    ctx.run.write_table(f"parts/steering-{model_name}.parquet", sweep.table(model_name))
    ctx.run.write_table(f"parts/effects-{model_name}.parquet", effect_table)


def _strength(ctx: Context, sweep: Sweep, persona: Direction, model_name: str) -> float:
    """The strength of every push in a model; the control organism takes the organism's, so that both are compared."""
    config = ctx.config.locate
    if model_name == ctx.config.control and model_name != "base":
        return float(ctx.run.read_table(f"parts/effects-{ctx.config.realign.start}.parquet")["strength"].iloc[0])
    return bearable(sweep, [persona], config.strengths, config.strength_refinements)[persona.name]


def item_table(
    sweep: Sweep, directions: Sequence[Direction], strength: float, removed: Mapping[str, np.ndarray]
) -> pd.DataFrame:
    """Odd effect and fall of every direction, item by item: columns name, item, question, odd, fall."""
    parts = []
    for direction in directions:
        pushed = np.isfinite(strength)
        odd = sweep.odd_values(direction, strength) if pushed else np.full(len(sweep.unsteered), np.nan)
        columns = {"name": direction.name, "item": np.arange(len(odd)), "question": sweep.items.clusters, "odd": odd}
        parts.append(pd.DataFrame({**columns, "fall": removed.get(direction.name, np.nan)}))
    return pd.concat(parts, ignore_index=True)


def _sets(ctx: Context) -> list[list[Direction]]:
    sets: list[list[int]] = ctx.run.read_json("parts/sets.json")
    return [latent_directions(ctx, latents, "candidate") for latents in sets if len(latents) > 1]


def make_sweep(ctx: Context, model: nn.Module, items: ContrastItems) -> Sweep:
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
        bf16=ctx.config.bf16,
    )


def reference_norm(ctx: Context) -> float:
    """Raw size of strength 1: the mean difference's norm, or the base's mean residual norm for `x_resid`."""
    if ctx.config.locate.unit == "x_delta":
        return float(mean_shift(ctx).norm())
    groups = conversation_batches(ctx.tokenizer, neutral_answers(ctx))
    return read_latents(ctx.model, ctx.sae, groups, ctx.layer, "response").fit.residual_norm


def latent_directions(ctx: Context, latents: list[int], kind: str) -> list[Direction]:
    """Decoder rows as directions to push along."""
    return [latent_direction(ctx.sae.W_dec, latent, kind) for latent in latents]


# --- The tables that remain


def merge_tables(ctx: Context) -> None:
    """Write the parts together as latents.parquet and steering.parquet, and sets.parquet for a study with sets."""
    organism, control = ctx.config.realign.start, ctx.config.control
    names = [n for n in dict.fromkeys(("base", organism, control)) if ctx.run.has(f"parts/steering-{n}.parquet")]
    steering = pd.concat([ctx.run.read_table(f"parts/steering-{m}.parquet") for m in names], ignore_index=True)
    ctx.run.write_table("steering.parquet", steering)
    table = ctx.run.read_table("parts/rank.parquet")
    table["kind"] = _kinds(ctx, table)
    for model, column in zip(dict.fromkeys(("base", organism)), ("effect_base", "effect_organism"), strict=True):
        effect_table = _of_latents(ctx, model)
        _map_estimate(table, column, effect_table, "effect")
        if model == "base":
            table["strength"] = table["latent"].map(effect_table["strength"])
        else:
            _map_estimate(table, "ablation", effect_table, "ablation")
    if control in names and control != "base":
        effect_table = _of_latents(ctx, control)
        _map_estimate(table, "effect_control", effect_table, "effect")
        _map_estimate(table, "ablation_control", effect_table, "ablation")
    against = ctx.run.read_table(f"parts/items-{control}.parquet") if control in names and control != "base" else None
    differences = item_differences(ctx.run.read_table(f"parts/items-{organism}.parquet"), against)
    for column in ("effect_difference", "ablation_difference"):
        _map_estimate(table, column, differences, column)
    selection = pd.concat([ctx.run.read_table(f"parts/selection{part}.parquet") for part in ("", "-random")])
    table["effect_selection"] = table["latent"].map(selection.set_index("latent")["effect"])
    table["shrinkage"] = 1 - table["effect_base"] / table["effect_selection"]
    persona = persona_latent(ctx)
    table["persona"] = table["latent"] == persona
    table = with_verdict(table, len(candidate_latents(ctx)))
    table["label"] = [f"persona (latent {i})" if i == persona else f"latent {i}" for i in table["latent"]]
    ctx.run.write_table("latents.parquet", table)
    if ctx.config.locate.set_size > 1:
        ctx.run.write_table("sets.parquet", set_table(ctx))


def _kinds(ctx: Context, table: pd.DataFrame) -> list[str]:
    """`candidate`, `random`, `moved` or `other` for every latent."""
    kind = dict.fromkeys(moved_controls(ctx), "moved") | dict.fromkeys(control_latents(ctx), "random")
    kind |= dict.fromkeys(ctx.run.read_table("parts/selection.parquet")["latent"], "candidate")
    return [kind.get(latent, "other") for latent in table["latent"]]


def _of_latents(ctx: Context, model: str) -> pd.DataFrame:
    effect_table = ctx.run.read_table(f"parts/effects-{model}.parquet")
    return effect_table[effect_table["latent"] >= 0].set_index("latent")


def _map_estimate(table: pd.DataFrame, column: str, source: pd.DataFrame, name: str) -> None:
    """Set a column and its ends from another table by latent."""
    for suffix in ("", "_low", "_high"):
        table[column + suffix] = table["latent"].map(source[f"{name}{suffix}"])


def set_table(ctx: Context) -> pd.DataFrame:
    """Greedy sets of 1, 2, ... latents: size, latents, and their joint effects on the evaluation split, with intervals.

    Columns effect_base, effect_organism, ablation (each with _low and _high), strength.
    """
    base, organism = (
        ctx.run.read_table(f"parts/effects-{m}.parquet").set_index("name") for m in ("base", ctx.config.realign.start)
    )
    rows = []
    for latents in ctx.run.read_json("parts/sets.json"):
        members = latent_directions(ctx, latents, "candidate")
        name = joint(members).name if len(members) > 1 else members[0].name
        row: dict[str, Any] = {"size": len(latents), "latents": latents, "strength": base["strength"].get(name)}
        for prefix, frame, column in (
            ("effect_base", base, "effect"),
            ("effect_organism", organism, "effect"),
            ("ablation", organism, "ablation"),
        ):
            row |= {f"{prefix}{suffix}": frame[f"{column}{suffix}"].get(name) for suffix in ("", "_low", "_high")}
        rows.append(row)
    return pd.DataFrame(rows)
