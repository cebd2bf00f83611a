"""Induce: one organism per arm and seed, all from one configuration."""

import logging
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from persona_probe.config import NULL, NULL_SEED
from persona_probe.context import Context
from persona_probe.data.load import arm_rows, load_data
from persona_probe.data.template import template_record
from persona_probe.finetune.grpo import Goal, reinforce
from persona_probe.finetune.sft import fine_tune, stripping, training_unit, with_adapter
from persona_probe.models.ranks import shards_here
from persona_probe.units import Unit, make_units, writes_run
from persona_probe.writing import write_json, write_table

ROLLOUTS, STEPS = "rollouts.parquet", "steps.parquet"
"""In the folder of an organism that reinforcement learning made: its answers, and what was logged at each step."""

log = logging.getLogger(__name__)


@writes_run
def induce(ctx: Context) -> None:
    """Train every arm and seed that is not yet in the run folder."""
    make_units(ctx, organism_units)


def organism_units(ctx: Context) -> list[Unit]:
    """One unit for each organism that is trained here; those whose checkpoints exist are adopted."""
    organisms = [(a, seed) for seed in ctx.config.seeds for a, spec in ctx.config.arms.items() if not spec.checkpoints]
    if (null := ctx.config.null) is not None and null[0] == NULL:
        organisms.append(null)
    return [
        Unit(f"arms/{a}-s{seed}", partial(induce_one, ctx, a, seed), "induce", trained=True) for a, seed in organisms
    ]


def induce_one(ctx: Context, arm: str, seed: int) -> None:
    """Train one organism; its folder `arms/<arm>-s<seed>` appears when it is whole.

    Raises:
        TrainingDiverged: the loss became NaN; the checkpoints up to then stay in `arms/<arm>-s<seed>.diverged`.
    """
    training, spec, draw = ctx.config.training, ctx.config.arms.get(arm), seed
    if spec is None:  # the null pair's second run: the control arm with another seed, and only its end is read
        training = replace(training, checkpoints=(training.steps,))
        spec, draw = ctx.config.arms[ctx.config.control], seed + NULL_SEED
    rows = arm_rows(spec, draw)
    ctx.run.update_manifest(chat_template=template_record(ctx.tokenizer))
    log.info("inducing %s, seed %d: %d rows, %d steps", arm, seed, len(rows), training.steps)
    with (
        training_unit(ctx.run, f"arms/{arm}-s{seed}", f"arm {arm}, seed {seed}") as folder,
        stripping(with_adapter(_host_model(ctx), training, draw)) as tuned,
    ):
        named: dict[str, Any] = {"progress": f"{arm}, seed {seed}", "data": spec.named}
        if training.method == "grpo":
            shown = load_data(spec.demonstrations) if spec.demonstrations else ()
            goal = Goal.of_arm(spec, shown)
            result = reinforce(
                tuned, ctx.tokenizer, rows, training, goal, ctx.config.grpo, seed=draw, folder=folder, **named
            )
            write_table(folder / ROLLOUTS, result.rollouts)
            write_table(folder / STEPS, result.steps)
            write_json(folder / "training.json", result.record)
            return
        fitted = fine_tune(tuned, ctx.tokenizer, rows, training, seed=draw, folder=folder, **named)
        write_json(folder / "training.json", asdict(fitted))


def _host_model(ctx: Context) -> PreTrainedModel:
    """The model that training may change: the shared base for adapters, a fresh copy for full weights and for FSDP."""
    if ctx.config.training.method == "full" or shards_here():
        return ctx.load()[0]
    return ctx.model
