"""What a monitor was asked to do, checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError, unknown
from persona_probe.monitor.events import Behaviour
from persona_probe.monitor.reading import Features, FeatureSet, Snapshot
from persona_probe.monitor.records import Anchor

if TYPE_CHECKING:
    from persona_probe.monitor.actions.action import ActionContext

# --- When readings are taken

EVERY, PROBES = 25, 12
"""Optimizer steps between readings, and packaged probes, where nothing is asked for: at most 2% of training's time on
two cores (`make bench-monitor`)."""


@dataclass(frozen=True)
class Schedule:
    """Every so many optimizer steps, or at chosen ones."""

    every: int | None
    steps: frozenset[int]

    @classmethod
    def of(cls, every: int | None, steps: Sequence[int] | None) -> "Schedule":
        """Check what a user asked for; `every` goes before `steps`.

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


MODES = ("probe", "passive", "both")
Measure = Callable[[nn.Module], Behaviour | float]
OnReading = Callable[[int, Snapshot, nn.Module], None]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The arguments of a `FeatureMonitor`, see there."""

    sae: Any | None
    features: Features
    probes: Sequence[Conversation]
    positions: str
    layer: int
    schedule: Schedule
    mode: str
    bf16: bool
    fit_every: int
    band_sd: float
    base: Anchor | Snapshot | str | Path | None
    path: Path | None
    values_path: Path | None
    passive_positions: str
    max_passive_tokens: int | None
    behaviour: Mapping[str, Measure]
    behaviour_every: int | None
    on_reading: OnReading | None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        for name, value in (("fit_every", self.fit_every), ("behaviour_every", self.behaviour_every)):
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if not self.band_sd > 0:
            raise InputError(f"band_sd must be above zero, not {self.band_sd}")
        FeatureSet(self.sae, self.features)  # refuses what no model could have

    @property
    def probing(self) -> bool:
        """Whether probes are run."""
        return self.mode in ("probe", "both")

    @property
    def passive(self) -> bool:
        """Whether the training batches are read."""
        return self.mode in ("passive", "both")


def measures(behaviour: "Measure | Mapping[str, Measure] | None") -> dict[str, Measure]:
    """Behaviour measurements by name."""
    if behaviour is None:
        return {}
    return dict(behaviour) if isinstance(behaviour, Mapping) else {"behaviour": behaviour}


# --- The training run around a monitor, as far as the monitor is told


@dataclass
class Training:
    """Model and trainer pieces; in a plain loop there is no control, state or args."""

    model: nn.Module
    control: TrainerControl | None = None
    state: TrainerState | None = None
    args: TrainingArguments | None = None
    optimizer: Optimizer | None = None
    scheduler: Any = None
    checkpoint_folder: Path | None = None
    accumulation: int = 1
    """Micro-batches per optimizer step, where there are no args to say it."""
    max_steps: int | None = None
    """Where training ends, where there is no state to say it."""
    logged_loss: float | Tensor | None = None
    logged_rate: float | None = None

    @property
    def loss(self) -> float | None:
        """The latest that was logged; a tensor is fetched only when it is asked for."""
        return None if self.logged_loss is None else float(self.logged_loss)

    @property
    def learning_rate(self) -> float | None:
        """The optimizer's own, of its first group; where there is none, the latest that was logged."""
        if self.optimizer is None:
            return self.logged_rate
        rate = self.optimizer.param_groups[0]["lr"]
        return float(rate)

    @property
    def replicated(self) -> bool:
        """Whether the trainer splits batches over devices in one process (`nn.DataParallel`)."""
        if isinstance(self.model, nn.DataParallel):
            return True
        return self.args is not None and self.args.parallel_mode is ParallelMode.NOT_DISTRIBUTED

    @property
    def micro_batches(self) -> int:
        """Per optimizer step."""
        return self.accumulation if self.args is None else self.args.gradient_accumulation_steps

    @property
    def last_step(self) -> int | None:
        """The step at which training ends, where the trainer knows."""
        return self.max_steps if self.state is None else self.state.max_steps

    @property
    def counted_tokens(self) -> int | None:
        """The trainer's own count of training tokens, where it keeps one without padding."""
        if self.args is None or self.state is None or self.args.include_num_input_tokens_seen != "non_padding":
            return None
        return int(self.state.num_input_tokens_seen)

    def note(self, logs: dict[str, Any]) -> None:
        """Take loss and learning rate from what a trainer logs."""
        self.logged_loss = logs.get("loss", self.logged_loss)
        self.logged_rate = logs.get("learning_rate", self.logged_rate)

    def context(self, step: int, monitor: Any) -> "ActionContext":
        """What actions get."""
        from persona_probe.monitor.actions.action import ActionContext

        return ActionContext(
            step=step,
            model=self.model,
            monitor=monitor,
            control=self.control,
            state=self.state,
            args=self.args,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            checkpoint_folder=self.checkpoint_folder,
        )
