"""The settings of a monitor, checked: what is read, when, and compared with what."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError, unknown
from persona_probe.models.places import Where
from persona_probe.monitor.events import Behaviour
from persona_probe.monitor.features import FeatureGroups, Features
from persona_probe.monitor.reading import Snapshot
from persona_probe.monitor.reading_records import Anchor
from persona_probe.saes.hooks import PlacedSae, Saes, placed_saes

EVERY, PROBES = 40, 12
"""Default optimizer steps between readings, and default number of packaged probes: together at most 1% of training's
time on two cores (`make bench-monitor`)."""
MODES = ("probe", "passive", "both")
PASSIVE_POSITIONS = ("response", "all")
Measure = Callable[[nn.Module], Behaviour | float]
OnReading = Callable[[int, Snapshot, nn.Module], None]


@dataclass(frozen=True)
class Schedule:
    """When readings are taken: at every `every`-th optimizer step, or at chosen steps."""

    every: int | None
    steps: frozenset[int]

    @classmethod
    def of(cls, every: int | None, steps: Sequence[int] | None) -> "Schedule":
        """Check the two arguments; `every` takes precedence over `steps`.

        Raises:
            InputError: `every` below 1.
        """
        if every is not None and every < 1:
            raise InputError(f"every must be at least 1, not {every}")
        return cls(every or (None if steps is not None else EVERY), frozenset(steps or ()))

    def due(self, step: int) -> bool:
        """Whether a reading belongs to this step."""
        return step in self.steps if self.every is None else step % self.every == 0

    def at_start(self, step: int) -> bool:
        """Whether training that begins at this step is read before its first step."""
        return self.every is not None or step in self.steps


@dataclass(frozen=True)
class PassiveReading:
    """How the training batches are read, in the modes `passive` and `both`.

    Raises:
        InputError: unknown positions, or `max_tokens` below 1.
    """

    positions: str = "response"
    """`response` (labels other than -100; all tokens where the model is given no labels) or `all` tokens that are not
    padding."""
    max_tokens: int | None = None
    """Tokens read per optimizer step, evenly spaced; None takes 4,096, or 512 where the whole dictionary is encoded."""

    def __post_init__(self) -> None:
        if self.positions not in PASSIVE_POSITIONS:
            raise unknown("positions of PassiveReading", self.positions, PASSIVE_POSITIONS)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens of PassiveReading must be at least 1, not {self.max_tokens}")


@dataclass(frozen=True)
class BehaviourMeasurement:
    """What is measured of the model's behaviour at the readings' steps.

    Raises:
        InputError: `every` below 1.
    """

    measure: Measure | Mapping[str, Measure]
    """One function, or several by name: called with the model in eval mode without gradients, gives a number or a
    `Behaviour`."""
    every: int | None = None
    """Measure only at steps that this divides; None measures at every reading."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise InputError(f"every of BehaviourMeasurement must be at least 1, not {self.every}")

    @property
    def by_name(self) -> dict[str, Measure]:
        """The measurements; one that has no name is called `behaviour`."""
        return dict(self.measure) if isinstance(self.measure, Mapping) else {"behaviour": self.measure}

    def due(self, step: int) -> bool:
        """Whether the step is one to measure at."""
        return self.every is None or step % self.every == 0


@dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """The arguments of a `FeatureMonitor` that decide what a run reads; their meaning is written there."""

    sae: Saes | None
    features: Features
    probes: Sequence[Conversation]
    positions: str
    layer: Where | None
    schedule: Schedule
    mode: str
    bf16: bool
    fit_every: int
    band_sd: float
    base: Anchor | Snapshot | str | Path | None
    path: Path | None
    values_path: Path | None
    passive: PassiveReading
    behaviour: BehaviourMeasurement | None
    on_reading: OnReading | None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        if self.fit_every < 1:
            raise InputError(f"fit_every must be at least 1, not {self.fit_every}")
        if not self.band_sd > 0:
            raise InputError(f"band_sd must be above zero, not {self.band_sd}")
        _ = self.groups  # refuses what no model could have

    @property
    def groups(self) -> FeatureGroups:
        """The features, not yet checked against a model."""
        return FeatureGroups.of(self.sae, self.features, self.layer)

    @property
    def saes(self) -> list[PlacedSae]:
        """The SAEs with their places; none where all features are directions."""
        if self.sae is None:
            return []
        if isinstance(self.sae, (Mapping, list, tuple)):
            return placed_saes(self.sae)
        reads = self.groups.parts[0]
        return [PlacedSae(self.sae, reads.reads, reads.writes)]

    @property
    def runs_probes(self) -> bool:
        """Whether probes are run."""
        return self.mode in ("probe", "both")

    @property
    def reads_batches(self) -> bool:
        """Whether the training batches are read."""
        return self.mode in ("passive", "both")
