"""Mitigations in which the monitor acts: it stops the run, or asks for corrective batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from transformers import TrainerCallback

from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.finetune.sft import AtSteps
from persona_probe.mitigate.mitigation import MitigatedRun, Mitigation, MitigationInputs
from persona_probe.monitor.band import Band
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.reading import Snapshot
from persona_probe.monitor.settings import OnReading


@dataclass(frozen=True)
class Watched(Mitigation):
    """Base of the mitigations that read the persona while training."""

    uses: ClassVar[tuple[str, ...]] = ("band", "probes")

    every: int = 2
    """Steps between readings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise InputError(f"{self.name}: every must be at least 1, not {self.every}")

    def check(self, inputs: MitigationInputs) -> None:
        """Also refuses inputs with nothing to read."""
        super().check(inputs)
        if inputs.persona is None:
            raise InputError(
                f"{self.name} needs a latent with its SAE, or a direction, to watch: pass MitigationInputs(...)"
            )


def persona_monitor(run: MitigatedRun, every: int, on_reading: OnReading) -> FeatureMonitor:
    """A monitor of the persona alone; a reading that fails ends the run."""
    inputs, persona = run.inputs, run.inputs.persona
    assert persona is not None
    return FeatureMonitor(
        None if isinstance(persona, Tensor) else inputs.sae,
        {"persona": persona},
        list(inputs.probes),
        every=every,
        layer=inputs.layer,
        positions=inputs.positions,
        tokenizer=inputs.tokenizer,
        bf16=run.training.bf16,
        on_reading=on_reading,
        on_error="raise",
        log=False,
    )


def widened(band: Band, times: float) -> Band:
    """A band about the same centre, `times` as wide."""
    centre, half = (band.low + band.high) / 2, (band.high - band.low) / 2
    return Band(centre - times * half, centre + times * half)


@dataclass
class StopAbove:
    """A stop rule: the persona stood above a level for some readings in a row."""

    run: MitigatedRun
    level: float
    patience: int
    in_a_row: int = field(default=0, init=False)

    def on_reading(self, step: int, snapshot: Snapshot, _model: nn.Module) -> None:
        """Count a reading of the monitor."""
        mean = float(snapshot.values[:, 0].mean())
        self.run.readings.append((step, mean))
        self.in_a_row = self.in_a_row + 1 if mean > self.level else 0

    def met(self, _model: nn.Module, _step: int) -> bool:
        """Whether the count is full."""
        return self.in_a_row >= self.patience


@dataclass(frozen=True)
class EarlyStop(Watched):
    """Stops when the persona feature rises above its base band. A fall below it is no reason: that is no persona."""

    name: ClassVar[str] = "early_stop"
    summary: ClassVar[str] = "The monitor stops the run when the persona feature stands above its base band."
    unit: ClassVar[str] = "width of the band that is allowed, in base bands; 0 never stops"

    patience: int = 1
    """Readings in a row above the band."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience < 1:
            raise InputError(f"{self.name}: patience must be at least 1, not {self.patience}")

    def callbacks(self, run: MitigatedRun) -> list[TrainerCallback]:
        """The monitor, then the stop rule that it feeds."""
        if not self.strength:
            return []
        assert run.inputs.band is not None
        rule = StopAbove(run, widened(run.inputs.band, self.strength).high, self.patience)
        every_step = range(1, run.training.steps + 1)
        return [persona_monitor(run, self.every, rule.on_reading), AtSteps(every_step, rule.met)]


@dataclass(frozen=True)
class Alternating(Watched):
    """Competence and conformity by turns: task batches while the persona is quiet, corrective ones while it is not.

    While the last reading lies above the base band, `strength` of the steps take a corrective batch of the training's
    batch size, at even distances; the task batch of such a step is left out, so that the run keeps its length.
    """

    name: ClassVar[str] = "alternating"
    summary: ClassVar[str] = (
        "Task batches give way to corrective ones while the monitor finds the persona feature above its base band."
    )
    unit: ClassVar[str] = "share of the steps above the band that are corrective"
    largest: ClassVar[float] = 1.0
    uses: ClassVar[tuple[str, ...]] = ("band", "probes", "corrective")

    def callbacks(self, run: MitigatedRun) -> list[TrainerCallback]:
        """The monitor, which says when."""
        if not self.strength:
            return []

        def on_reading(step: int, snapshot: Snapshot, _model: nn.Module) -> None:
            self.see(run, step, float(snapshot.values[:, 0].mean()))

        return [persona_monitor(run, self.every, on_reading)]

    def see(self, run: MitigatedRun, step: int, mean: float) -> None:
        """Take a value of the persona: above the band the correction begins, at its upper end or below it is over."""
        assert run.inputs.band is not None
        run.readings.append((step, mean))
        run.correcting = mean > run.inputs.band.high

    def extra_rows(self, inputs: MitigationInputs) -> Sequence[Conversation]:
        """The corrective rows."""
        return inputs.corrective if self.strength else ()

    def corrects(self, run: MitigatedRun) -> bool:
        """Every step above the band at strength 1, every second at a half."""
        if not run.correcting or not self.strength:
            return False
        run.above += 1
        # Rounded, since ten times a tenth is not quite one.
        return int(round(run.above * self.strength, 6)) > int(round((run.above - 1) * self.strength, 6))
