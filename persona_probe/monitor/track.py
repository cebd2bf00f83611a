"""The stage `track`: features, SAE fit and contrast index at every checkpoint of every arm and seed."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from torch import nn

from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import conversation_batches
from persona_probe.evaluate.contrast import contrast_index
from persona_probe.evaluate.tables import join_evals
from persona_probe.latents.stage import control_latents, mean_shift, persona_latent
from persona_probe.monitor.band import Band, base_band
from persona_probe.monitor.reading import FeatureReader, Features, Snapshot


def study_features(ctx: Context) -> Features:
    """The features a study follows: persona latent, mean difference, and two random latents."""
    shift = mean_shift(ctx)  # first, since its error names the stage to run
    controls = control_latents(ctx)
    return {
        "persona": persona_latent(ctx),
        "mean difference": shift,
        "random latent A": controls[0],
        "random latent B": controls[1],
    }


def make_reader(
    ctx: Context, features: Features | None = None, probes: Sequence[Conversation] | None = None
) -> FeatureReader:
    """The reader of the study's features on its probes, or of other features, or on other probes."""
    features = study_features(ctx) if features is None else features
    groups = conversation_batches(ctx.tokenizer, ctx.probes if probes is None else probes)
    return FeatureReader(ctx.sae, features, groups, ctx.layer, ctx.config.monitor.positions, ctx.config.bf16)


def track(ctx: Context) -> None:
    """Measure the base and every checkpoint. Finished organisms are in parts/ and are not measured again."""
    reader = make_reader(ctx)
    with ctx.run.timed("track"):
        base = measure_base(ctx, reader)
    for seed in ctx.config.seeds:
        for arm in ctx.config.arms:
            if not ctx.run.has(f"parts/track-{arm}-s{seed}.evals.parquet"):
                with ctx.run.timed("track"):
                    _track_arm(ctx, reader, base, arm, seed)
    merge_parts(ctx)


def measure_base(ctx: Context, reader: FeatureReader) -> Snapshot:
    """The base model's reading; its contrast items are scored once."""
    with ctx.base() as model:
        snapshot = reader.read(model)
    if not ctx.run.has("parts/track-base.evals.parquet"):
        seed = ctx.config.seeds[0]
        with ctx.base() as model:
            evals = eval_rows(ctx, model, "base", seed, 0)
        ctx.run.write_table("parts/track-base.readings.parquet", reading_rows(snapshot, snapshot, "base", seed, 0))
        ctx.run.write_table("parts/track-base.evals.parquet", evals)
    return snapshot


def _track_arm(ctx: Context, reader: FeatureReader, base: Snapshot, arm: str, seed: int) -> None:
    base_evals = ctx.run.read_table("parts/track-base.evals.parquet").query("split == 'evaluation'")
    readings = [reading_rows(base, base, arm, seed, 0)]
    evals = [base_evals.assign(arm=arm, seed=seed)]
    for step in ctx.run.steps(arm, seed):
        with ctx.organism(arm, seed, step) as model:
            readings.append(reading_rows(reader.read(model), base, arm, seed, step))
            evals.append(eval_rows(ctx, model, arm, seed, step))
    ctx.run.write_table(f"parts/track-{arm}-s{seed}.readings.parquet", pd.concat(readings))
    ctx.run.write_table(f"parts/track-{arm}-s{seed}.evals.parquet", pd.concat(evals))


def reading_rows(snapshot: Snapshot, base: Snapshot, arm: str, seed: int, step: int) -> pd.DataFrame:
    """Rows of readings.parquet."""
    frame = pd.DataFrame(snapshot.rows())
    frame.insert(0, "arm", arm)
    frame.insert(1, "seed", seed)
    frame.insert(2, "step", step)
    frame["base_mean"] = base.values.mean(axis=0)
    frame["base_sd"] = base.values.std(axis=0, ddof=1)
    return frame


def eval_rows(
    ctx: Context, model: nn.Module, arm: str, seed: int, step: int, split: str = "evaluation"
) -> pd.DataFrame:
    """Rows of evals.parquet: one per contrast item of a split."""
    items = ctx.evaluation if split == "evaluation" else ctx.selection
    frame = contrast_index(model, items, bf16=ctx.config.bf16)
    head: dict[str, Any] = {"arm": arm, "seed": seed, "step": step, "split": split}
    for place, (name, value) in enumerate(head.items()):
        frame.insert(place, name, value)
    return frame


def persona_band(ctx: Context, base: Snapshot) -> Band:
    """The base band of the persona feature."""
    column = base.names.index("persona")
    return base_band(base.values[:, column], ctx.config.monitor.band_sd)


def merge_parts(ctx: Context) -> None:
    """Join all parts as readings.parquet and evals.parquet, in a fixed order."""
    parts = sorted((ctx.run.path / "parts").glob("*.readings.parquet"))
    ctx.run.write_table("readings.parquet", pd.concat([pd.read_parquet(part) for part in parts], ignore_index=True))
    join_evals(ctx.run)
