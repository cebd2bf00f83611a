"""Realign: fine-tune the incorrect organism on a small corrective set, while the monitor watches the persona."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from persona_probe.config import StudyConfig, Training
from persona_probe.context import Context
from persona_probe.data.chat import Conversation
from persona_probe.errors import TrainingDiverged
from persona_probe.finetune.data import arm_rows
from persona_probe.finetune.narrow import keep_good
from persona_probe.finetune.realignment.methods import organism_to_train
from persona_probe.finetune.sft import Fitted, fine_tune
from persona_probe.models.adapters import strip_adapter
from persona_probe.monitor.bands import Band
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.reading import Snapshot
from persona_probe.monitor.track import eval_rows, make_reader, merge_parts, persona_band, reading_rows, study_features

log = logging.getLogger(__name__)


@dataclass
class StopRule(TrainerCallback):
    """Stops when the feature was in its band and behaviour restored for some readings in a row.

    Args:
        steps: steps at which `measure` is called (after the monitor's own reading).
        measure: takes (model, step), records, and says whether both conditions hold.
        wanted: how many readings in a row; 0 never stops.
    """

    steps: tuple[int, ...]
    measure: Callable[[nn.Module, int], bool]
    wanted: int
    in_a_row: int = field(default=0, init=False)

    def _look(self, model: nn.Module, step: int) -> bool:
        self.in_a_row = self.in_a_row + 1 if self.measure(model, step) else 0
        return self.wanted > 0 and self.in_a_row >= self.wanted

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the organism before any correction."""
        if 0 in self.steps:
            self._look(kwargs["model"], 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure when due, and stop when the rule says so."""
        if state.global_step in self.steps and self._look(kwargs["model"], state.global_step):
            control.should_training_stop = True


@dataclass
class Recorder:
    """Collects readings and contrast items of one corrective run."""

    ctx: Context
    arm: str
    seed: int
    base: Snapshot
    band: Band
    base_index: float
    readings: list[pd.DataFrame] = field(default_factory=list)
    evals: list[pd.DataFrame] = field(default_factory=list)

    def on_reading(self, step: int, snapshot: Snapshot, _model: nn.Module) -> None:
        """Keep a reading of the monitor."""
        self.readings.append(reading_rows(snapshot, self.base, self.arm, self.seed, step))

    def measure(self, model: nn.Module, step: int) -> bool:
        """Take the contrast index; True when feature and behaviour are both back."""
        frame = self._tracked() if step == 0 else None
        if frame is None:
            frame = eval_rows(self.ctx, model, self.arm, self.seed, step)
        self.evals.append(frame)
        latest = self.readings[-1].query("feature == 'persona'")["mean"].mean()
        return self.band.holds(float(latest)) and float(frame["value"].mean()) <= self.base_index

    def _tracked(self) -> pd.DataFrame | None:
        """The organism's items before any correction, where track has scored them already."""
        start = self.ctx.config.realign.start
        name = f"parts/track-{start}-s{self.seed}.evals.parquet"
        if not self.ctx.run.has(name):
            return None
        last = self.ctx.run.read_table(name).query(f"step == {self.ctx.last_step(start, self.seed)}")
        return last.assign(arm=self.arm, step=0)


def corrective_training(config: StudyConfig) -> Training:
    """The training settings of a corrective run."""
    realign = config.realign
    return replace(
        config.training,
        batch_size=realign.batch_size,
        steps=realign.steps,
        lr=config.training.lr if realign.lr is None else realign.lr,
        checkpoints=(realign.steps,),
    )


def realign(ctx: Context) -> None:
    """Run every corrective arm and seed that is not yet in the run folder."""
    if not ctx.config.realign.arms:
        return
    with ctx.timed("realign"), ctx.base() as model:
        base = make_reader(ctx).read(model)
    for seed in ctx.config.seeds:
        for arm in ctx.config.realign.arms:
            if not ctx.run.has(f"parts/realign-{arm}-s{seed}.evals.parquet"):
                with ctx.timed("realign"):
                    realign_one(ctx, arm, seed, base)
    merge_parts(ctx)


def realign_one(ctx: Context, arm: str, seed: int, base: Snapshot) -> None:
    """One corrective run, from the last checkpoint of `realign.start`."""
    config, name = ctx.config.realign, f"arms/{arm}-s{seed}"
    evals = ctx.run.read_table("parts/track-base.evals.parquet").query("split == 'evaluation'")
    recorder = Recorder(ctx, arm, seed, base, persona_band(ctx, base), float(evals["value"].mean()))
    with ctx.run.staging(name) as folder:
        tuned = organism_to_train(ctx.model, start_checkpoint(ctx, seed), "continued", ctx.config.training, seed)
        rows, training = arm_rows(config.arms[arm], seed), corrective_training(ctx.config)
        try:
            said, stop = ctx.config.realign.arms[arm].named, config.stop_readings
            fitted = train_watched(recorder, tuned, rows, training, config.readings, stop, folder, said)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{arm}, seed {seed}: {error}; {keep_good(ctx, folder, name)}") from None
        finally:
            if isinstance(tuned, PeftModel):
                strip_adapter(tuned)
        (folder / "training.json").write_text(json.dumps(asdict(fitted), indent=2) + "\n")
        ctx.run.record_hashes(folder, name)
    ctx.run.write_table(f"parts/realign-{arm}-s{seed}.readings.parquet", pd.concat(recorder.readings))
    ctx.run.write_table(f"parts/realign-{arm}-s{seed}.evals.parquet", pd.concat(recorder.evals))


def train_watched(
    recorder: Recorder,
    tuned: nn.Module,
    rows: Sequence[Conversation],
    training: Training,
    steps: tuple[int, ...],
    stop_readings: int,
    folder: Path,
    data: str,
) -> Fitted:
    """Fine-tune an organism under the study's monitor and the stop rule; `recorder` keeps what they see at `steps`."""
    ctx = recorder.ctx
    monitor = FeatureMonitor(
        ctx.sae,
        study_features(ctx),
        ctx.probes,
        steps=steps,
        layer=ctx.layer,
        positions=ctx.config.monitor.positions,
        bf16=ctx.config.bf16,
        on_reading=recorder.on_reading,
        on_error="raise",  # a correction without its evals is no result
        base=recorder.base,
        log=False,
    )
    return fine_tune(
        tuned,
        ctx.tokenizer,
        rows,
        training,
        seed=recorder.seed,
        folder=folder,
        callbacks=[monitor, StopRule(steps, recorder.measure, stop_readings)],
        progress=f"{recorder.arm}, seed {recorder.seed}",
        data=f"{ctx.config.arms[ctx.config.realign.start].named}, then {data}",
    )


def start_checkpoint(ctx: Context, seed: int) -> Path:
    """The last checkpoint of the arm that is repaired."""
    start = ctx.config.realign.start
    checkpoint = ctx.run.checkpoint(start, seed, ctx.last_step(start, seed))
    assert checkpoint is not None
    return checkpoint


def steps_to_band(readings: pd.DataFrame, band: Band) -> float:
    """First step from which the persona feature stays in the band (until the end of the run); NaN if it never does."""
    curve = readings.query("feature == 'persona'").sort_values("step")
    return first_lasting(curve["step"].tolist(), [band.holds(value) for value in curve["mean"]])


def first_lasting(steps: Sequence[float], inside: Sequence[bool]) -> float:
    """The first step from which all are inside until the end; NaN if the last is not."""
    if not inside or not inside[-1]:
        return float("nan")
    outside = np.flatnonzero(~np.array(inside))
    return float(steps[0 if outside.size == 0 else int(outside[-1]) + 1])
