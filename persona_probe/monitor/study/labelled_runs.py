"""One labelled run of the monitor's study: trained with the monitor attached, measured at the same steps."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from persona_probe.context import Context, ModelAndSae
from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.load import Row, arm_rows, evenly_spaced, load_data
from persona_probe.errors import InputError
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.files import read_tensors
from persona_probe.finetune.sft import AtSteps, Fitted, fine_tune, stripping, with_adapter
from persona_probe.latents.persona_vectors import load_persona_pairs, persona_vector, response_means
from persona_probe.monitor.features import Features
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.study.labelled_config import MonitorStudy
from persona_probe.monitor.study.rivals import recent_loss, weight_norm
from persona_probe.monitor.track import study_features
from persona_probe.runs import RunFolder
from persona_probe.units import Unit, make_units
from persona_probe.writing import write_json, write_table

log = logging.getLogger(__name__)


class MonitorStudyContext(ModelAndSae):
    """The study's folder, and what all its runs share, each loaded or measured on first use.

    Raises:
        InputError: the device is not available, or the folder holds something else, or a study of other settings.
    """

    config: MonitorStudy

    def __init__(self, config: MonitorStudy, path: Path, device: str | None = None) -> None:
        super().__init__(config, device)
        self.run = RunFolder.claim(path, "monitor-study", "study of the monitor", {"config_hash": config.hash})
        self.run.update_manifest(config=asdict(config))

    def opener(self, device: str) -> "Callable[[], MonitorStudyContext]":
        """Makes this context in another process."""
        return partial(MonitorStudyContext, self.config, self.run.path.resolve(), device)

    @cached_property
    def probes(self) -> list[Conversation]:
        """The monitor's probes."""
        return load_data(self.config.probes)[: self.config.probe_limit]

    def some_contrast_rows(self, split: str, count: int) -> list[Row]:
        """`count` contrast items of a split, evenly spaced, the last one included."""
        return evenly_spaced(self.contrast_rows(split), count, ends=True)

    @cached_property
    def items(self) -> ContrastItems:
        """The contrast items that measure behaviour."""
        rows = self.some_contrast_rows("evaluation", self.config.contrast_items)
        return ContrastItems.build(self.tokenizer, rows, batch_size=32)

    def behaviour(self, model: nn.Module) -> pd.DataFrame:
        """Columns item and value: the contrast index of a model, item by item (nats per token)."""
        return contrast_index(model, self.items, bf16=self.config.bf16)[["item", "value"]]

    @cached_property
    def base_behaviour(self) -> pd.DataFrame:
        """The base model's `behaviour`."""
        return self.behaviour(self.model)

    def residual(self, model: nn.Module) -> Float[np.ndarray, " d_model"]:
        """Mean residual stream over probes, of their answer tokens, in raw units."""
        means = response_means(model, self.tokenizer, self.probes, self.layer, batch_size=32, bf16=self.config.bf16)
        return means.astype(np.float64).mean(axis=0)

    @cached_property
    def base_residual(self) -> Float[np.ndarray, " d_model"]:
        """The base model's `residual`."""
        return self.residual(self.model)

    def measure_base(self) -> None:
        """Measure the base model before an adapter changes it."""
        _ = self.base_behaviour, self.base_residual


RECORD = "run.json"


def run_units(names: Sequence[str], ctx: MonitorStudyContext) -> list[Unit]:
    """One unit for each of these runs, watched for the study's features.

    Raises:
        InputError: a finished run was made with other settings (raised when it is asked for).
    """
    return _units(ctx, names, lambda: watched_features(ctx).features)


def features_units(ctx: MonitorStudyContext) -> list[Unit]:
    """One unit for each run whose drift gives the mean difference; they are watched for the config's latents."""
    return _units(ctx, ctx.config.named("features"), lambda: {n: f.latent for n, f in ctx.config.latents.items()})


def _units(ctx: MonitorStudyContext, names: Sequence[str], features: Callable[[], Features]) -> list[Unit]:
    return [
        Unit(f"runs/{name}", partial(_train_run, ctx, name, features), f"run {name}", partial(_finished, ctx, name))
        for name in names
    ]


def _finished(ctx: MonitorStudyContext, name: str) -> bool:
    change = "rename the run, or choose another --out"
    return ctx.run.finished(f"runs/{name}", ctx.config.settings_of(name), RECORD, change)


def _train_run(ctx: MonitorStudyContext, name: str, features: Callable[[], Features]) -> None:
    """Train a run; its folder `runs/<name>` appears when it is whole."""
    schedule = ctx.config.schedule(name)
    log.info("run %s: %d steps, %d readings", name, schedule[-1], len(schedule))
    with ctx.run.staging(f"runs/{name}") as folder:
        monitor = _monitor(ctx, features(), schedule, folder / "monitor.jsonl")
        measures = RunMeasures(ctx, _behaviour_steps(ctx.config, name))
        fitted = _fit(ctx, name, [monitor, AtSteps(schedule, measures.take)])
        _write(folder, name, monitor.readings, measures, fitted)
        write_json(folder / RECORD, ctx.config.settings_of(name))


@dataclass
class RunMeasures:
    """Weight norm, mean residual stream and behaviour of one run, step by step.

    Args:
        behaviour_steps: steps at which the contrast index is measured too.
    """

    ctx: MonitorStudyContext
    behaviour_steps: Sequence[int]
    steps: list[int] = field(default_factory=list, init=False)
    shifts: list[np.ndarray] = field(default_factory=list, init=False)
    """Mean residual stream minus the base's, one per step."""
    norms: list[float] = field(default_factory=list, init=False)
    evals: list[pd.DataFrame] = field(default_factory=list, init=False)

    def take(self, model: nn.Module, step: int) -> None:
        """Measure the model after a step; at step 0 it is the base model, which was measured before."""
        self.steps.append(step)
        self.norms.append(weight_norm(model))
        residual = self.ctx.residual(model) if step else self.ctx.base_residual
        self.shifts.append(residual - self.ctx.base_residual)
        if step in self.behaviour_steps:
            items = self.ctx.behaviour(model) if step else self.ctx.base_behaviour
            self.evals.append(items.assign(step=step))


def _behaviour_steps(config: MonitorStudy, name: str) -> tuple[int, ...]:
    schedule, use = config.schedule(name), config.runs[name].use
    return {"evaluation": schedule, "calibration": (0, schedule[-1]), "features": ()}[use]


def _monitor(ctx: MonitorStudyContext, features: Features, steps: tuple[int, ...], path: Path) -> FeatureMonitor:
    return FeatureMonitor(
        ctx.sae,
        features,
        ctx.probes,
        steps=steps,
        layer=ctx.layer,
        positions="response",
        bf16=ctx.config.bf16,
        path=path,
        on_error="raise",  # a hole in a run would be a hole in the evidence
        log=False,
    )


def _fit(ctx: MonitorStudyContext, name: str, callbacks: list[TrainerCallback]) -> Fitted:
    run, training = ctx.config.runs[name], ctx.config.training_of(name)
    rows = arm_rows(ctx.config.arms[run.arm], run.seed)
    ctx.measure_base()
    with stripping(with_adapter(ctx.model, training, run.seed)) as tuned, tempfile.TemporaryDirectory() as weights:
        return fine_tune(
            tuned,
            ctx.tokenizer,
            rows,
            training,
            seed=run.seed,
            folder=Path(weights),
            callbacks=callbacks,
            progress=name,
        )


def _write(folder: Path, name: str, readings: pd.DataFrame, measures: RunMeasures, fitted: Fitted) -> None:
    write_table(folder / "readings.parquet", readings.assign(run=name))
    if measures.evals:
        write_table(folder / "evals.parquet", pd.concat(measures.evals).assign(run=name))
    losses = recent_loss(fitted.losses, measures.steps)
    table = {"step": measures.steps, "weight_norm": measures.norms, "loss": losses}
    write_table(folder / "measures.parquet", pd.DataFrame(table).assign(run=name))
    save_file({"shift": torch.from_numpy(np.stack(measures.shifts))}, folder / "shift.safetensors")


def read_shifts(ctx: MonitorStudyContext, name: str) -> np.ndarray:
    """Mean residual shifts of a finished run at its readings: (readings, d_model), in raw units."""
    return read_tensors(ctx.run.path / f"runs/{name}/shift.safetensors", ["shift"])["shift"].numpy()


# --- The features that every run is watched for: chosen on other data, made once

FILE, WEIGHTS = "features/features.json", "features/directions.safetensors"
MEAN_DIFFERENCE, PERSONA_VECTOR = "mean difference", "persona vector"


@dataclass(frozen=True)
class WatchedFeatures:
    """Features with their sources."""

    features: dict[str, int | Tensor]
    sources: dict[str, str]
    """Where each comes from."""


def watched_features(ctx: MonitorStudyContext) -> WatchedFeatures:
    """The study's features, made once and then read from its folder.

    Raises:
        InputError: they were made from other latents or runs, or `features_from` cannot give them.
    """
    made_from = {name: ctx.config.settings_of(name) for name in ctx.config.named("features")}
    if not ctx.run.has(FILE):
        new_features = _from_study(ctx) if ctx.config.features_from else _from_pair(ctx)
        _write_features(ctx.run, new_features, made_from)
    record = ctx.run.read_json(FILE)
    if record["made_from"] != made_from:
        raise InputError("the study's features were made from other runs: choose another --out")
    directions = read_tensors(ctx.run.path / WEIGHTS)
    features: dict[str, int | Tensor] = {**record["latents"], **directions}
    return WatchedFeatures({name: features[name] for name in record["sources"]}, record["sources"])


def _write_features(run: RunFolder, features: WatchedFeatures, made_from: dict[str, Any]) -> None:
    latents = {name: f for name, f in features.features.items() if isinstance(f, int)}
    directions = {name: f for name, f in features.features.items() if isinstance(f, Tensor)}
    with run.staging("features") as folder:
        save_file(directions, folder / "directions.safetensors")
    run.write_json(FILE, {"latents": latents, "sources": features.sources, "made_from": made_from})


def _from_pair(ctx: MonitorStudyContext) -> WatchedFeatures:
    """Latents by the config; the mean difference is the last drift of the bad features run minus the benign one's."""
    latents = {name: f.latent for name, f in ctx.config.latents.items()}
    names = ctx.config.named("features")
    make_units(ctx, features_units)
    ends: dict[bool, Tensor] = {}
    for name in names:
        ends[ctx.config.runs[name].benign] = torch.from_numpy(read_shifts(ctx, name)[-1]).float()
    difference = f"residual shift on the probes of run {names[0]} and run {names[1]}, bad minus benign; not evaluated"
    sources = {name: f.source for name, f in ctx.config.latents.items()}
    return _with_directions(ctx, latents, ends[False] - ends[True], sources, difference)


def _from_study(ctx: MonitorStudyContext) -> WatchedFeatures:
    """Persona latent, random latents and mean difference of a located study."""
    assert ctx.config.features_from is not None
    study = Context.open(ctx.config.features_from)
    shared = {r.seed for r in ctx.config.runs.values()} & set(study.config.seeds)
    if shared:
        raise InputError(
            f"seed {min(shared)} is also a seed of {study.run.path}: evaluate other runs than chose features"
        )
    if (study.config.model, study.config.sae) != (ctx.config.model, ctx.config.sae):
        raise InputError(f"{study.run.path} is a study of another model or SAE: name the same in both configs")
    features: Features = study_features(study)
    latents = {name: f for name, f in features.items() if isinstance(f, int)}
    difference = features[MEAN_DIFFERENCE]
    assert isinstance(difference, Tensor)
    source = f"study {study.config.name}, seeds {list(study.config.seeds)}"
    return _with_directions(ctx, latents, difference.float(), dict.fromkeys(latents, source), source)


def _with_directions(
    ctx: MonitorStudyContext, latents: dict[str, int], shift: Tensor, sources: dict[str, str], source: str
) -> WatchedFeatures:
    """Latents with the mean difference, and with the persona vector, which is read from the base model."""
    rows = ctx.some_contrast_rows("selection", ctx.config.persona_vector_items)
    conversations = [conversation(row["question"], row["aligned"]) for row in rows]
    pairs, bf16 = load_persona_pairs(), ctx.config.bf16
    log.info("persona vector: %d prompt pairs, %d answers", len(pairs), len(conversations))
    with ctx.run.timed("persona vector"):
        vector = persona_vector(ctx.model, ctx.tokenizer, pairs, conversations, ctx.layer, bf16=bf16)
    directions = {
        MEAN_DIFFERENCE: shift.contiguous(),
        PERSONA_VECTOR: torch.tensor(vector.vector, dtype=torch.float32),
    }
    vector_source = f"base model, {vector.name}, selection split ({vector.paper})"
    return WatchedFeatures(
        {**latents, **directions}, {**sources, MEAN_DIFFERENCE: source, PERSONA_VECTOR: vector_source}
    )
