"""What all runs of a labelled study share: its folder, the model, the SAE, probes and contrast items, loaded once."""

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from persona_probe.context import Context, pick_device
from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.load import Row, arm_rows, evenly_spaced, load_contrast, load_data, read_contrast_file
from persona_probe.errors import InputError
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.finetune.sft import Fitted, fine_tune, stripping, with_adapter
from persona_probe.latents.persona_vectors import load_persona_pairs, persona_vector, response_means
from persona_probe.models.load import load_model
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.reading import Features
from persona_probe.monitor.study.config import MonitorStudy
from persona_probe.monitor.track import study_features
from persona_probe.runs import MANIFEST, RunFolder, git_revision, versions
from persona_probe.saes.load import check_fit, load_sae, sae_layer

log = logging.getLogger(__name__)


def open_folder(path: Path, config: MonitorStudy) -> RunFolder:
    """The study's folder, made or resumed.

    Raises:
        InputError: it holds something else, or runs of other shared settings.
    """
    folder = RunFolder(path)
    if folder.has(MANIFEST):
        if folder.manifest.get("config_hash") != config.hash:
            raise InputError(f"{path} holds a study of other settings: choose another --out")
    elif path.exists() and any(path.iterdir()):
        raise InputError(f"{path} exists and is no study of the monitor: choose another --out")
    else:
        start = {"config_hash": config.hash, "versions": versions(), "git_revision": git_revision(), "seconds": {}}
        folder.write_json(MANIFEST, {"kind": "monitor-study", **start})
    folder.update_manifest(config=asdict(config))
    return folder


class Lab:
    """One study's folder and the things loaded for it, each on first use."""

    def __init__(self, config: MonitorStudy, path: Path, device: str | None = None) -> None:
        self.config = config
        self.device = pick_device(device or config.device)
        self.folder = open_folder(path, config)

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_model(self.config.model, revision=self.config.revision, device=self.device)

    @property
    def model(self) -> PreTrainedModel:
        """The base model; runs put an adapter on it and take it off again."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer."""
        return self._loaded[1]

    @cached_property
    def sae(self) -> Any:
        """The SAE, checked against the model."""
        sae = load_sae(self.config.sae, device=self.device)
        check_fit(sae, self.model, sae_layer(sae) if self.config.layer is None else self.config.layer)
        return sae

    @cached_property
    def layer(self) -> int:
        """The decoder layer that is read."""
        return sae_layer(self.sae) if self.config.layer is None else self.config.layer

    @cached_property
    def probes(self) -> list[Conversation]:
        """The monitor's probes."""
        return load_data(self.config.probes)[: self.config.probe_limit]

    def contrast_rows(self, split: str, count: int) -> list[Row]:
        """`count` contrast items of a split, evenly spread over it."""
        named = self.config.contrast
        rows = load_contrast(split) if named == "general_contrast" else read_contrast_file(named, split)
        return evenly_spaced(rows, count, ends=True)

    @cached_property
    def items(self) -> ContrastItems:
        """The contrast items that measure behaviour."""
        rows = self.contrast_rows("evaluation", self.config.contrast_items)
        return ContrastItems.build(self.tokenizer, rows, batch_size=32)

    def behaviour(self, model: nn.Module) -> pd.DataFrame:
        """Columns item and value: the contrast index of a model, item by item (nats per token)."""
        return contrast_index(model, self.items, bf16=self.config.bf16)[["item", "value"]]

    @cached_property
    def base_behaviour(self) -> pd.DataFrame:
        """The base model's items."""
        return self.behaviour(self.model)

    def residual(self, model: nn.Module) -> Float[np.ndarray, " d_model"]:
        """Mean residual stream over probes, of their answer tokens, in raw units."""
        read = response_means(model, self.tokenizer, self.probes, self.layer, batch_size=32, bf16=self.config.bf16)
        return read.astype(np.float64).mean(axis=0)

    @cached_property
    def base_residual(self) -> Float[np.ndarray, " d_model"]:
        """The base model's mean residual stream."""
        return self.residual(self.model)

    def measure_base(self) -> None:
        """Read the base model before an adapter changes it."""
        _ = self.base_behaviour, self.base_residual

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the block's wall seconds for a stage."""
        start = time.monotonic()
        yield
        self.folder.add_seconds(stage, time.monotonic() - start)


@torch.no_grad()
def weight_norm(model: nn.Module) -> float:
    """Frobenius norm of all LoRA updates together: the root of the sum of |scale B A|^2 over adapted layers.

    It is computed from the small products, without the full matrices: |B A|^2 = tr((B^T B)(A A^T)).

    Raises:
        InputError: the model has no LoRA adapter on linear layers.
    """
    squares = [_square(m, name) for m in model.modules() if isinstance(m, LoraLayer) for name in m.active_adapters]
    found = [square for square in squares if square is not None]
    if not found:
        raise InputError("the model has no LoRA adapter whose norm could be taken: train with method lora")
    return float(torch.stack(found).sum().sqrt())


def _square(layer: LoraLayer, name: str) -> Tensor | None:
    if name not in layer.lora_A:
        return None
    a, b = _weight(layer.lora_A[name]), _weight(layer.lora_B[name])
    return (layer.scaling[name] ** 2 * ((b.T @ b) * (a @ a.T)).sum()).cpu()


def _weight(factor: nn.Module) -> Tensor:
    if not isinstance(factor, nn.Linear):
        raise InputError(f"the weight norm knows adapters of linear layers, not {type(factor).__name__}")
    return factor.weight.double()


def first_component(
    shifts: Float[np.ndarray, "checkpoints d_model"], towards: Float[np.ndarray, " d_model"]
) -> Float[np.ndarray, " d_model"]:
    """Unit first principal component of residual shifts (centred), its sign chosen so that it points as `towards` does.

    Raises:
        InputError: fewer than two shifts, or shifts that do not vary.
    """
    centred = shifts - shifts.mean(axis=0) if len(shifts) > 1 else np.zeros((1, 1))
    if not np.abs(centred).max() > 0:
        raise InputError("a principal component needs at least two checkpoints that differ")
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    return axis if float(axis @ towards) >= 0 else -axis


def drift_projections(
    shifts: Mapping[str, Float[np.ndarray, "checkpoints d_model"]], towards: Float[np.ndarray, " d_model"]
) -> dict[str, Float[np.ndarray, " checkpoints"]]:
    """Each run's shifts projected on the first component of the other runs' shifts (leave one run out).

    Args:
        shifts: run to probe-mean residual shifts from the base, in raw units.
        towards: fixes the sign; a direction from other data.

    Raises:
        InputError: fewer than two runs.
    """
    if len(shifts) < 2:
        raise InputError("leaving one run out needs at least two runs")
    return {run: own @ first_component(_others(shifts, run), towards) for run, own in shifts.items()}


def _others(shifts: Mapping[str, np.ndarray], left_out: str) -> np.ndarray:
    return np.concatenate([values for run, values in shifts.items() if run != left_out])


def recent_loss(losses: Sequence[float], steps: Sequence[int]) -> list[float]:
    """Mean training loss over the optimizer steps since the reading before; NaN for a reading without a step.

    Args:
        losses: of optimizer steps 1, 2, ... (nats per token).
        steps: of the readings, ascending.
    """
    starts = [0, *steps[:-1]]
    parts = [losses[start:stop] for start, stop in zip(starts, steps, strict=True)]
    return [float(np.mean(part)) if len(part) else float("nan") for part in parts]


# --- One labelled run: trained under the monitor's eye, everything read at the same steps, kept when whole

log = logging.getLogger(__name__)


@dataclass
class Measures(TrainerCallback):
    """Takes behaviour, mean residual stream and weight norm at the monitor's steps.

    Args:
        lab: the study's shared things; its base model was measured before.
        steps: steps at which residual stream and weight norm are taken.
        behaviour_steps: those at which the contrast index is taken as well.
    """

    lab: Lab
    steps: tuple[int, ...]
    behaviour_steps: tuple[int, ...]
    shifts: list[np.ndarray] = field(default_factory=list, init=False)
    """Mean residual stream minus the base's, one a step."""
    norms: list[float] = field(default_factory=list, init=False)
    evals: list[pd.DataFrame] = field(default_factory=list, init=False)

    def _take(self, model: nn.Module, step: int) -> None:
        self.norms.append(weight_norm(model))
        now = self.lab.residual(model) if step else self.lab.base_residual
        self.shifts.append(now - self.lab.base_residual)
        if step in self.behaviour_steps:
            items = self.lab.behaviour(model) if step else self.lab.base_behaviour
            self.evals.append(items.assign(step=step))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take step 0."""
        self._take(kwargs["model"], 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take a step that is due."""
        if state.global_step in self.steps:
            self._take(kwargs["model"], state.global_step)


def train_run(lab: Lab, name: str, features: Features) -> None:
    """Train a run, unless it is there; its folder `runs/<name>` appears when it is whole.

    Raises:
        InputError: the run that is there was made with other settings.
    """
    wanted = lab.config.settings_of(name)
    if lab.folder.has(f"runs/{name}"):
        if lab.folder.read_json(f"runs/{name}/run.json") != wanted:
            raise InputError(f"run {name!r} was made with other settings: rename it, or choose another --out")
        return
    schedule = lab.config.schedule(name)
    log.info("run %s: %d steps, %d readings", name, schedule[-1], len(schedule))
    with lab.timed(f"run {name}"), lab.folder.staging(f"runs/{name}") as folder:
        monitor = _monitor(lab, features, schedule, folder / "monitor.jsonl")
        measures = Measures(lab, schedule, _behaviour_steps(lab, name))
        fitted = _fit(lab, name, [monitor, measures])
        _write(folder, monitor.readings.assign(run=name), measures, fitted, name)
        (folder / "run.json").write_text(json.dumps(wanted, indent=2) + "\n")


def _behaviour_steps(lab: Lab, name: str) -> tuple[int, ...]:
    schedule, use = lab.config.schedule(name), lab.config.runs[name].use
    return {"evaluation": schedule, "calibration": (0, schedule[-1]), "features": ()}[use]


def _monitor(lab: Lab, features: Features, steps: tuple[int, ...], path: Path) -> FeatureMonitor:
    return FeatureMonitor(
        lab.sae,
        features,
        lab.probes,
        steps=steps,
        layer=lab.layer,
        positions="response",
        bf16=lab.config.bf16,
        path=path,
        on_error="raise",  # a hole in a run would be a hole in the evidence
        log=False,
    )


def _fit(lab: Lab, name: str, callbacks: list[TrainerCallback]) -> Fitted:
    run, training = lab.config.runs[name], lab.config.training_of(name)
    rows = arm_rows(lab.config.arms[run.arm], run.seed)
    lab.measure_base()
    with (
        stripping(with_adapter(lab.model, training, run.seed)) as tuned,
        tempfile.TemporaryDirectory() as weights,
    ):
        return fine_tune(
            tuned,
            lab.tokenizer,
            rows,
            training,
            seed=run.seed,
            folder=Path(weights),
            callbacks=callbacks,
            progress=name,
        )


def _write(folder: Path, readings: pd.DataFrame, measures: Measures, fitted: Fitted, name: str) -> None:
    steps = list(measures.steps)
    readings.to_parquet(folder / "readings.parquet", index=False)
    if measures.evals:
        pd.concat(measures.evals).assign(run=name).to_parquet(folder / "evals.parquet", index=False)
    table = {"step": steps, "weight_norm": measures.norms, "loss": recent_loss(fitted.losses, steps)}
    pd.DataFrame(table).assign(run=name).to_parquet(folder / "measures.parquet", index=False)
    save_file({"shift": torch.from_numpy(np.stack(measures.shifts))}, folder / "shift.safetensors")


def read_shifts(lab: Lab, name: str) -> np.ndarray:
    """Mean residual shifts of a run at its readings: (readings, d_model), in raw units."""
    return load_file(lab.folder.path / f"runs/{name}/shift.safetensors")["shift"].numpy()


log = logging.getLogger(__name__)
FILE, WEIGHTS = "features/features.json", "features/directions.safetensors"
MEAN_DIFFERENCE, PERSONA_VECTOR = "mean difference", "persona vector"


@dataclass(frozen=True)
class Fixed:
    """Features that every run is watched for."""

    features: dict[str, int | Tensor]
    sources: dict[str, str]
    """Where each comes from."""


def fixed_features(lab: Lab) -> Fixed:
    """The study's features, made once and then read from its folder.

    Raises:
        InputError: they were made from other latents or runs, or `features_from` cannot give them.
    """
    made_from = _made_from(lab.config)
    if not lab.folder.has(FILE):
        _write_features(lab, _from_study(lab) if lab.config.features_from else _from_pair(lab), made_from)
    held = lab.folder.read_json(FILE)
    if held["made_from"] != made_from:
        raise InputError("the study's features were made from other runs: choose another --out")
    directions = load_file(lab.folder.path / WEIGHTS)
    features: dict[str, int | Tensor] = {**held["latents"], **directions}
    return Fixed({name: features[name] for name in held["sources"]}, held["sources"])


def _made_from(config: MonitorStudy) -> dict[str, object]:
    return {name: config.settings_of(name) for name in config.named("features")}


def _write_features(lab: Lab, found: Fixed, made_from: dict[str, object]) -> None:
    latents = {name: f for name, f in found.features.items() if isinstance(f, int)}
    directions = {name: f for name, f in found.features.items() if isinstance(f, Tensor)}
    with lab.folder.staging("features") as folder:
        save_file(directions, folder / "directions.safetensors")
    lab.folder.write_json(FILE, {"latents": latents, "sources": found.sources, "made_from": made_from})


def _from_pair(lab: Lab) -> Fixed:
    """Latents by the config; the mean difference is the last drift of the bad features run minus the benign one's."""
    latents = {name: f.latent for name, f in lab.config.latents.items()}
    names = lab.config.named("features")
    ends: dict[bool, Tensor] = {}
    for name in names:
        train_run(lab, name, latents)
        ends[lab.config.runs[name].benign] = torch.from_numpy(read_shifts(lab, name)[-1]).float()
    difference = f"residual shift on the probes of run {names[0]} and run {names[1]}, bad minus benign; not evaluated"
    return _with_directions(
        lab, latents, ends[False] - ends[True], {n: f.source for n, f in lab.config.latents.items()}, difference
    )


def _from_study(lab: Lab) -> Fixed:
    """Persona latent, random latents and mean difference of a located study."""
    assert lab.config.features_from is not None
    study = Context.open(lab.config.features_from)
    shared = {r.seed for r in lab.config.runs.values()} & set(study.config.seeds)
    if shared:
        raise InputError(
            f"seed {min(shared)} is also a seed of {study.run.path}: evaluate other runs than chose features"
        )
    if (study.config.model, study.config.sae) != (lab.config.model, lab.config.sae):
        raise InputError(f"{study.run.path} is a study of another model or SAE: name the same in both configs")
    found: Features = study_features(study)
    latents = {name: f for name, f in found.items() if isinstance(f, int)}
    difference = found[MEAN_DIFFERENCE]
    assert isinstance(difference, Tensor)
    source = f"study {study.config.name}, seeds {list(study.config.seeds)}"
    return _with_directions(lab, latents, difference.float(), dict.fromkeys(latents, source), source)


def _with_directions(lab: Lab, latents: dict[str, int], shift: Tensor, sources: dict[str, str], source: str) -> Fixed:
    rows = lab.contrast_rows("selection", lab.config.persona_vector_items)
    talks = [conversation(row["question"], row["aligned"]) for row in rows]
    pairs, bf16 = load_persona_pairs(), lab.config.bf16
    log.info("persona vector: %d prompt pairs, %d answers", len(pairs), len(talks))
    with lab.timed("persona vector"):
        vector = persona_vector(lab.model, lab.tokenizer, pairs, talks, lab.layer, bf16=bf16)
    directions = {
        MEAN_DIFFERENCE: shift.contiguous(),
        PERSONA_VECTOR: torch.tensor(vector.vector, dtype=torch.float32),
    }
    told = {MEAN_DIFFERENCE: source, PERSONA_VECTOR: f"base model, {vector.name}, selection split ({vector.paper})"}
    return Fixed({**latents, **directions}, {**sources, **told})
