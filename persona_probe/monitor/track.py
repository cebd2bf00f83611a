"""The stage `track`: features, SAE fit and contrast index at every checkpoint of every arm and seed."""

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import pandas as pd
from torch import nn

from persona_probe.config import NULL
from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import conversation_batches
from persona_probe.evaluate.contrast import contrast_index
from persona_probe.evaluate.tables import join_evals
from persona_probe.files import read_parquet
from persona_probe.latents.stage import best_of_further, control_latents, mean_shift, persona_latent
from persona_probe.monitor.band import Band, base_band
from persona_probe.monitor.features import Features
from persona_probe.monitor.reading import FeatureReader, Snapshot
from persona_probe.units import Unit, make_units, writes_run


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


def tracked_features(ctx: Context, own: Features, best: Mapping[str, int]) -> Features:
    """The study's features, as those of its first SAE, and the best latent of each further SAE."""
    first = ctx.saes[0].name
    named = {name: (first, feature) if isinstance(feature, int) else feature for name, feature in own.items()}
    return {**named, **{f"best of {name}": (name, latent) for name, latent in best.items()}}  # pyright: ignore[reportReturnType]


def make_reader(
    ctx: Context, features: Features | None = None, probes: Sequence[Conversation] | None = None
) -> FeatureReader:
    """The reader of the study's features on its probes, or of other features, or on other probes."""
    saes: Any = ctx.sae
    if features is None:
        features = study_features(ctx)
        if best := best_of_further(ctx):
            saes, features = ctx.saes, tracked_features(ctx, features, best)
    groups = conversation_batches(ctx.tokenizer, ctx.probes if probes is None else probes)
    return FeatureReader(saes, features, groups, ctx.layer, ctx.config.monitor.positions, ctx.config.bf16)


@writes_run
def track(ctx: Context) -> None:
    """Measure the base and every checkpoint. Finished organisms are in parts/ and are not measured again."""
    study_features(ctx)  # first, since its error names the stage to run
    make_units(ctx, base_units)
    if ctx.workers is not None and ctx.workers.joint:
        make_units(ctx, step_units)
    make_units(ctx, arm_units)
    make_units(ctx, null_units)
    merge_parts(ctx)


class Tracker:
    """The study's reader and the base model's reading, each made on first use."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    @cached_property
    def reader(self) -> FeatureReader:
        """Reads the study's features on its probes."""
        return make_reader(self.ctx)

    @cached_property
    def base(self) -> Snapshot:
        """The base model's reading."""
        with self.ctx.base() as model:
            return self.reader.read(model)


def base_units(ctx: Context) -> list[Unit]:
    """One unit: the base model's reading and contrast items."""
    return [Unit("parts/track-base.evals.parquet", partial(_track_base, Tracker(ctx)), "track")]


def arm_units(ctx: Context) -> list[Unit]:
    """One unit for each organism, with all its checkpoints."""
    tracker = Tracker(ctx)
    return [
        Unit(
            f"{_part(arm, seed)}.evals.parquet",
            partial(_track_arm, tracker, arm, seed),
            "track",
            partial(_is_tracked, ctx, arm, seed),
        )
        for seed in ctx.config.seeds
        for arm in ctx.config.arms
    ]


NULL_EVALS, NULL_READINGS = "null/evals.parquet", "null/readings.parquet"
"""Items and readings of the null pair's second run at its last step, where a study trains one for it."""


def null_units(ctx: Context) -> list[Unit]:
    """One unit: the last step of the null pair's second run, where it is no seed of the study."""
    null = ctx.config.null
    if null is None or null[0] != NULL or not ctx.run.has(f"arms/{NULL}-s{null[1]}"):
        return []
    return [Unit(NULL_EVALS, partial(_track_null, Tracker(ctx), *null), "track")]


def _track_null(tracker: Tracker, arm: str, seed: int) -> None:
    ctx, base = tracker.ctx, tracker.base
    step = ctx.last_step(arm, seed)
    with ctx.organism(arm, seed) as model:
        readings = reading_rows(tracker.reader.read(model), base, arm, seed, step)
        evals = eval_rows(ctx, model, arm, seed, step)
    ctx.run.write_table(NULL_READINGS, readings)
    ctx.run.write_table(NULL_EVALS, evals)


def step_units(ctx: Context) -> list[Unit]:
    """One unit for each checkpoint, for workers; an organism's unit then joins its tables."""
    tracker = Tracker(ctx)
    return [
        Unit(
            f"{_part(arm, seed)}/{step}.evals.parquet",
            partial(_track_one, tracker, arm, seed, step),
            "track",
            partial(_is_step_tracked, ctx, arm, seed, step),
        )
        for seed in ctx.config.seeds
        for arm in ctx.config.arms
        for step in _missing_steps(ctx, arm, seed)
    ]


def _is_step_tracked(ctx: Context, arm: str, seed: int, step: int) -> bool:
    return ctx.run.has(f"{_part(arm, seed)}/{step}.evals.parquet") or step not in _missing_steps(ctx, arm, seed)


def _track_one(tracker: Tracker, arm: str, seed: int, step: int) -> None:
    _ = tracker.base  # read while no adapter is on the model
    with tracker.ctx.trajectory(arm, seed) as at:
        _track_step(tracker, at(step), arm, seed, step)


def _part(arm: str, seed: int) -> str:
    """One organism's tables, without their endings; while it is tracked a folder with the tables of each step."""
    return f"parts/track-{arm}-s{seed}"


def _is_tracked(ctx: Context, arm: str, seed: int) -> bool:
    """Whether all its checkpoints are in its tables: an adopted run may have grown since."""
    return ctx.run.has(f"{_part(arm, seed)}.evals.parquet") and not _missing_steps(ctx, arm, seed)


def _missing_steps(ctx: Context, arm: str, seed: int) -> list[int]:
    """Steps that have a checkpoint and are not in the organism's tables."""
    table = f"{_part(arm, seed)}.evals.parquet"
    tracked = set(ctx.run.read_table(table)["step"]) if ctx.run.has(table) else set()
    return [step for step in ctx.run.steps(arm, seed) if step not in tracked]


def _track_base(tracker: Tracker) -> None:
    ctx, snapshot, seed = tracker.ctx, tracker.base, tracker.ctx.config.seeds[0]
    with ctx.base() as model:
        evals = eval_rows(ctx, model, "base", seed, 0)
    ctx.run.write_table("parts/track-base.readings.parquet", reading_rows(snapshot, snapshot, "base", seed, 0))
    ctx.run.write_table("parts/track-base.evals.parquet", evals)


def _track_arm(tracker: Tracker, arm: str, seed: int) -> None:
    """Measure the checkpoints that are not measured yet; each is on disk before the next is loaded."""
    ctx, place = tracker.ctx, _part(arm, seed)
    missing, base = _missing_steps(ctx, arm, seed), tracker.base  # read while no adapter is on the model
    with ctx.trajectory(arm, seed) as at:
        for step in missing:
            if not ctx.run.has(f"{place}/{step}.evals.parquet"):
                _track_step(tracker, at(step), arm, seed, step)
    readings, evals = (_with_steps(ctx, f"{place}.{kind}.parquet", missing) for kind in ("readings", "evals"))
    if not ctx.run.has(f"{place}.evals.parquet"):
        base_evals = ctx.run.read_table("parts/track-base.evals.parquet").query("split == 'evaluation'")
        readings.insert(0, reading_rows(base, base, arm, seed, 0))
        evals.insert(0, base_evals.assign(arm=arm, seed=seed))
    ctx.run.write_table(f"{place}.readings.parquet", _by_step(readings))
    ctx.run.write_table(f"{place}.evals.parquet", _by_step(evals))
    shutil.rmtree(ctx.run.path / place, ignore_errors=True)


def _track_step(tracker: Tracker, model: nn.Module, arm: str, seed: int, step: int) -> None:
    """The tables of one checkpoint; that of the items comes last and says that both are there."""
    ctx, place = tracker.ctx, f"{_part(arm, seed)}/{step}"
    readings = reading_rows(tracker.reader.read(model), tracker.base, arm, seed, step)
    ctx.run.write_table(f"{place}.readings.parquet", readings)
    ctx.run.write_table(f"{place}.evals.parquet", eval_rows(ctx, model, arm, seed, step))


def _with_steps(ctx: Context, table: str, steps: Sequence[int]) -> list[pd.DataFrame]:
    """An organism's table so far, and those of further steps."""
    folder, kind = table.split(".", 1)
    further = [ctx.run.read_table(f"{folder}/{step}.{kind}") for step in steps]
    if not ctx.run.has(f"{folder}.evals.parquet"):
        return further
    before = ctx.run.read_table(table)
    return [before[~before["step"].isin(steps)], *further]


def _by_step(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(frames, ignore_index=True).sort_values("step", kind="stable", ignore_index=True)


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
    ctx.run.write_table(
        "readings.parquet",
        pd.concat(
            [read_parquet(part, (), "move it elsewhere and run `persona-probe track RUN` again") for part in parts],
            ignore_index=True,
        ),
    )
    join_evals(ctx.run)
