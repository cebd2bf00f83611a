"""The configuration of a labelled study of the monitor."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from persona_probe.config import Arm, Training, check_finite, check_least, check_seed, hashed_values
from persona_probe.errors import InputError, unknown
from persona_probe.names import check_name, check_names

SIDES = ("above", "below", "both")
USES = ("features", "calibration", "evaluation")
RECOMPUTED = ("rate", "held", "side", "arms", "runs")
"""Keys that may change in a study that has begun: results are computed again, and every run keeps its settings."""


@dataclass(frozen=True)
class LatentFeature:
    """A latent to watch."""

    latent: int
    """Its index in the SAE."""
    source: str
    """The data on which it was chosen; it must not be that of the evaluated runs."""


@dataclass(frozen=True)
class LabelledRun:
    """One training run of the study."""

    arm: str
    """An arm of the study."""
    seed: int
    """Seed of adapter, data order and mixture."""
    benign: bool
    """Whether its data is benign."""
    use: str = "evaluation"
    """`evaluation`, `calibration` (benign runs that set the thresholds), or `features` (the mean difference's pair)."""
    steps: int | None = None
    """Optimizer steps; None takes training.steps."""
    readings: tuple[int, ...] | None = None
    """Steps of the readings; None takes the study's."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_least(self, 1, "steps")
        if self.use not in USES:
            raise unknown("use of a run", self.use, USES)
        if self.use == "calibration" and not self.benign:
            raise InputError("a calibration run must be benign: thresholds come from benign runs")


@dataclass(frozen=True)
class MonitorStudy:
    """Runs on known data, watched by the monitor and by its rivals."""

    name: str
    """Name of the run folder."""
    sae: str
    """As `load_sae` takes it."""
    arms: dict[str, Arm]
    """Data conditions."""
    runs: dict[str, LabelledRun]
    """Runs by name."""
    model: str = "smollm2-135m-instruct"
    """As `load_model` takes it."""
    revision: str | None = None
    """Hub revision."""
    layer: int | None = None
    """Decoder layer; None reads it from the SAE's metadata."""
    features_from: str | None = None
    """Run folder of another study whose persona latent, random latents and mean difference are watched."""
    latents: dict[str, LatentFeature] = field(default_factory=dict)
    """Latents to watch where there is no `features_from`."""
    persona_vector_items: int = 20
    """Aligned answers of the contrast set's selection split on which the persona vector is read."""
    probes: str = "neutral_probes"
    """The monitor's probes; each must end with an answer."""
    probe_limit: int | None = None
    """Use this many of the probes; None uses all."""
    contrast: str = "general_contrast"
    """The contrast set: the packaged one, or a JSONL file."""
    contrast_items: int = 30
    """Items of its evaluation split that measure behaviour, spread evenly over the split."""
    training: Training = field(default_factory=Training)
    """Training of all runs; `checkpoints` has no effect, weights are not kept."""
    readings: tuple[int, ...] = (0, 2, 4, 8, 12, 16, 24)
    """Steps at which everything is read; 0 and the last step always are."""
    rate: float = 0.05
    """False alarms per benign run that thresholds may give."""
    held: tuple[int, ...] = (1, 2)
    """Rules that are evaluated: a value beyond its threshold for this many readings in a row."""
    side: str = "above"
    """The side of the base on which a value alarms: `above`, `below` or `both`."""
    device: str = "auto"
    """`auto` takes a GPU where there is one."""
    bf16: bool = True
    """bf16 autocast for readings and scores."""

    def __post_init__(self) -> None:
        check_name(self.name, "the study's name")
        check_names(self.arms, "arm")
        check_names(self.runs, "run")
        check_names(self.latents, "feature", also=" +")
        check_finite(self)
        if self.side not in SIDES:
            raise unknown("side", self.side, SIDES)
        check_least(self, 2, "probe_limit")
        check_least(self, 0, "layer")
        if any(one < 1 for one in self.held):
            raise InputError(f"held must be numbers of readings from 1 up, not {list(self.held)}")
        if self.training.method != "lora":
            raise InputError("training.method must be lora: the weight norm is that of the adapter")
        if (self.features_from is None) == (not self.latents):
            raise InputError("give either latents, or features_from, the run folder of a study that has located some")
        for name, run in self.runs.items():
            if run.arm not in self.arms:
                raise InputError(f"run {name!r}: {unknown('arm', run.arm, self.arms)}")
        for name in ("contrast_items", "persona_vector_items"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} must be at least 2, not {getattr(self, name)}")
        if not self.held or not 0 < self.rate < 1:
            raise InputError("held must name a number of readings, and rate must lie between 0 and 1")
        self._check_uses()

    def _check_uses(self) -> None:
        pair = [self.runs[name].benign for name in self.named("features")]
        if sorted(pair) != ([] if self.features_from else [False, True]):
            need = "no runs" if self.features_from else "one benign and one other run"
            raise InputError(f"{need} must have use: features (they give the mean difference), not {len(pair)} runs")
        feature_seeds = {self.runs[name].seed for name in self.named("features")}
        shared = [
            n for n in (*self.named("calibration"), *self.named("evaluation")) if self.runs[n].seed in feature_seeds
        ]
        if shared:
            raise InputError(f"run {shared[0]!r} has the seed of a features run: watched features need other runs")
        evaluated = {self.runs[name].benign for name in self.named("evaluation")}
        if len(self.named("calibration")) < 2 or len(evaluated) < 2:
            raise InputError("runs need at least two for calibration, and benign and other runs for evaluation")

    def named(self, use: str) -> list[str]:
        """Names of the runs of one use."""
        return [name for name, run in self.runs.items() if run.use == use]

    def data_set(self, name: str) -> str:
        """The data set of a run: what its arm's rows are about. A mixture counts as the set of its bad rows.

        Runs of one data set share rows, so they are not independent evidence.
        """
        arm = self.arms[self.runs[name].arm]
        only_good = arm.mix_with is not None and arm.bad_fraction == 0
        return (arm.mix_with if only_good else arm.data) or self.runs[name].arm

    def training_of(self, name: str) -> Training:
        """The training settings of a run."""
        return replace(self.training, steps=self.runs[name].steps or self.training.steps, checkpoints=())

    def schedule(self, name: str) -> tuple[int, ...]:
        """The steps at which a run is read: those of `readings` that it reaches, 0 and its last."""
        steps, readings = self.training_of(name).steps, self.runs[name].readings or self.readings
        return tuple(sorted({0, steps, *(s for s in readings if 0 <= s <= steps)}))

    def is_long(self, name: str) -> bool:
        """Whether a run trains for more steps than the study's others."""
        return self.training_of(name).steps > self.training.steps

    def settings_of(self, name: str) -> dict[str, Any]:
        """The settings that decide a run, besides those of the whole study."""
        run = self.runs[name]
        arm = hashed_values(self.arms[run.arm])
        return json.loads(json.dumps({**asdict(run), "data": arm, "schedule": self.schedule(name)}))

    @property
    def hash(self) -> str:
        """Hash of the settings that all runs share (12 hexadecimal digits)."""
        shared = {key: value for key, value in hashed_values(self).items() if key not in RECOMPUTED}
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]
