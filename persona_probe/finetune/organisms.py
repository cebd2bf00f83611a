"""Induce: one organism per arm and seed, all from one configuration."""

import logging
from dataclasses import asdict

from transformers import PreTrainedModel

from persona_probe.context import Context
from persona_probe.data.load import arm_rows
from persona_probe.finetune.sft import fine_tune, stripping, training_unit, with_adapter
from persona_probe.models.load import load_model
from persona_probe.runs import write_json

log = logging.getLogger(__name__)


def induce(ctx: Context) -> None:
    """Train every arm and seed that is not yet in the run folder."""
    for seed in ctx.config.seeds:
        for arm in ctx.config.arms:
            if not ctx.run.has(f"arms/{arm}-s{seed}"):
                with ctx.run.timed("induce"):
                    induce_one(ctx, arm, seed)


def induce_one(ctx: Context, arm: str, seed: int) -> None:
    """Train one organism; its folder `arms/<arm>-s<seed>` appears when it is whole.

    Raises:
        TrainingDiverged: the loss became NaN; the checkpoints up to then stay in `arms/<arm>-s<seed>.diverged`.
    """
    training, rows = ctx.config.training, arm_rows(ctx.config.arms[arm], seed)
    log.info("inducing %s, seed %d: %d rows, %d steps", arm, seed, len(rows), training.steps)
    with (
        training_unit(ctx.run, f"arms/{arm}-s{seed}", f"arm {arm}, seed {seed}") as folder,
        stripping(with_adapter(_host_model(ctx), training, seed)) as tuned,
    ):
        fitted = fine_tune(
            tuned,
            ctx.tokenizer,
            rows,
            training,
            seed=seed,
            folder=folder,
            progress=f"{arm}, seed {seed}",
            data=ctx.config.arms[arm].named,
        )
        write_json(folder / "training.json", asdict(fitted))


def _host_model(ctx: Context) -> PreTrainedModel:
    """The model that training may change: the shared base for adapters, a fresh copy for full weights."""
    if ctx.config.training.method == "full":
        return load_model(ctx.config.model, revision=ctx.config.revision, device=ctx.device)[0]
    return ctx.model
