"""A study's directions that are no latents: computed on the selection split, stored, and what latents say of them."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona_probe.context import Context
from persona_probe.data.chat import conversation
from persona_probe.errors import InputError
from persona_probe.locate.directions import NamedDirection, logistic_probe, mean_difference_direction
from persona_probe.locate.evidence import Evidence
from persona_probe.locate.sweep import Direction
from persona_probe.locate.unexplained import carriers, random_reference

FILE = "directions.safetensors"


def write_directions(ctx: Context, evidence: Evidence) -> None:
    """Write directions.safetensors (raw units) and directions.json: source, held-out AUROC, and who carries them."""
    found = {"mean_difference": mean_difference_direction(evidence.at("tuned"), evidence.at("control"))}
    if "logistic_probe" in ctx.config.locate.directions:
        found["logistic_probe"] = _probe(ctx, evidence)
    if "persona_vector" in ctx.config.locate.directions:
        found["persona_vector"] = _persona_vector(ctx)
    scratch = ctx.run.path / ".directions.tmp"
    save_file({key: torch.tensor(d.vector, dtype=torch.float32) for key, d in found.items()}, scratch)
    ctx.run.record_hashes(scratch.replace(ctx.run.path / FILE))
    reference = random_reference(evidence.decoder, seed=ctx.seed)
    ctx.run.write_json("directions.json", [_entry(k, d, evidence, reference) for k, d in found.items()])


def _entry(key: str, direction: NamedDirection, evidence: Evidence, reference: Any) -> dict[str, Any]:
    carried = carriers(evidence.decoder, direction.vector, reference=reference)
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
    """Between misaligned and aligned answers on the base model."""
    assert evidence.misaligned is not None
    resid, clusters = evidence.at("base").resid, np.asarray(evidence.clusters)
    bad = evidence.misaligned
    return logistic_probe(resid[bad], resid[~bad], clusters[bad].tolist(), clusters[~bad].tolist(), seed=ctx.seed)


def _persona_vector(ctx: Context) -> NamedDirection:
    """Of the base model, teacher-forced on the aligned answers of the selection split."""
    from persona_probe.data.persona_prompts import load_persona_pairs
    from persona_probe.locate.persona_vector import persona_vector

    talks = [conversation(row["question"], row["aligned"]) for row in ctx.selection.rows]
    pairs, bf16 = load_persona_pairs(), ctx.config.bf16
    return persona_vector(ctx.model, ctx.tokenizer, pairs, talks, ctx.layer, mixed_precision=bf16)


def read_directions(ctx: Context) -> dict[str, Float[Tensor, " d_model"]]:
    """The stored directions by key, in raw units.

    Raises:
        InputError: locate has not run.
    """
    path = ctx.run.path / FILE
    if not path.is_file():
        raise InputError("this run has no mean difference yet: run `persona-probe locate RUN` first")
    return load_file(path)


def mean_shift(ctx: Context) -> Float[Tensor, " d_model"]:
    """The arms' mean activation difference, incorrect minus correct, in raw units."""
    return read_directions(ctx)["mean_difference"]


def pushes(ctx: Context) -> list[Direction]:
    """The directions to push along; the mean difference first, which has a kind of its own."""
    found = read_directions(ctx)
    return [
        Direction(key.replace("_", " "), "mean_difference" if key == "mean_difference" else "direction", found[key])
        for key in sorted(found, key=lambda k: (k != "mean_difference", k))
    ]
