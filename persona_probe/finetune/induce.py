"""Induce: one organism per arm and seed, side by side from one configuration."""

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from persona_probe.context import Context
from persona_probe.data.load import arm_rows
from persona_probe.errors import TrainingDiverged
from persona_probe.finetune.sft import fine_tune, with_adapter
from persona_probe.models.adapters import strip_adapter
from persona_probe.models.load import load_model

log = logging.getLogger(__name__)


def induce(ctx: Context) -> None:
    """Train every arm and seed that is not yet in the run folder."""
    for seed in ctx.config.seeds:
        for arm in ctx.config.arms:
            if not ctx.run.has(f"arms/{arm}-s{seed}"):
                with ctx.timed("induce"):
                    induce_one(ctx, arm, seed)


def induce_one(ctx: Context, arm: str, seed: int) -> None:
    """Train one organism; its folder appears when it is whole.

    Raises:
        TrainingDiverged: the loss became NaN; checkpoints up to then stay in `arms/<arm>-s<seed>.diverged`.
    """
    name, training = f"arms/{arm}-s{seed}", ctx.config.training
    rows = arm_rows(ctx.config.arms[arm], seed)
    log.info("inducing %s, seed %d: %d rows, %d steps", arm, seed, len(rows), training.steps)
    with ctx.run.staging(name) as folder:
        tuned = with_adapter(host_model(ctx), training, seed)
        try:
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
        except TrainingDiverged as error:
            raise TrainingDiverged(f"arm {arm}, seed {seed}: {error}; {keep_good(ctx, folder, name)}") from None
        finally:
            if isinstance(tuned, PeftModel):
                strip_adapter(tuned)
        (folder / "training.json").write_text(json.dumps(asdict(fitted), indent=2) + "\n")
        ctx.run.record_hashes(folder, name)


def host_model(ctx: Context) -> PreTrainedModel:
    """The model that training may change: the shared base for adapters, a fresh copy for full weights."""
    if ctx.config.training.method == "full":
        return load_model(ctx.config.model, revision=ctx.config.revision, device=ctx.device)[0]
    return ctx.model


def keep_good(ctx: Context, folder: Path, name: str) -> str:
    """Move the checkpoints of a run that diverged out of staging; says where they are."""
    kept = ctx.run.path / f"{name}.diverged"
    shutil.rmtree(kept, ignore_errors=True)
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, kept)
    return f"the checkpoints up to then are in {kept}"
