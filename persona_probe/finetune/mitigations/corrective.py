"""Corrective fine-tuning after the run, and the mitigation that does nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from transformers import TrainerCallback

from persona_probe.errors import InputError
from persona_probe.finetune.mitigations.ground import MitigatedRun
from persona_probe.finetune.mitigations.mitigation import Mitigation
from persona_probe.finetune.sft import Fitted, fine_tune


@dataclass(frozen=True)
class NoMitigation(Mitigation):
    """The plain run that all others are compared with."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "Plain fine-tuning on the bad rows: what every mitigation is compared with."
    unit: ClassVar[str] = "nothing"
    largest: ClassVar[float] = 0.0


@dataclass(frozen=True)
class Corrective(Mitigation):
    """A short fine-tuning on good answers once the run is over, with the run's own settings but for its length."""

    name: ClassVar[str] = "corrective"
    summary: ClassVar[str] = (
        "After the run a few steps on corrective rows (re-alignment: Wang et al. 2025, arXiv 2506.19823)."
    )
    unit: ClassVar[str] = "corrective steps"
    uses: ClassVar[tuple[str, ...]] = ("corrective",)

    batch: int = 4
    """Corrective rows in each step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strength != int(self.strength):
            raise InputError(f"{self.name}: strength counts steps: give a whole number, not {self.strength}")
        if self.batch < 1:
            raise InputError(f"{self.name}: batch must be at least 1, not {self.batch}")

    def after(
        self, run: MitigatedRun, folder: Path, callbacks: Sequence[TrainerCallback], progress: str | None
    ) -> Fitted | None:
        """The correction; its last step is saved in `folder/corrective`."""
        steps = int(self.strength)
        if steps == 0:
            return None
        training = replace(run.training, steps=steps, batch_size=self.batch, checkpoints=(steps,))
        return fine_tune(
            run.model,
            run.ground.tokenizer,
            run.ground.corrective,
            training,
            seed=run.seed,
            folder=folder / "corrective",
            callbacks=callbacks,
            progress=f"{progress}, correction" if progress else None,
        )
