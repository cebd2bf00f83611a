"""Interleaving: safe rows of other domains between the training rows."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.finetune.mitigations.ground import Ground, MitigatedRun
from persona_probe.finetune.mitigations.mitigation import Mitigation
from persona_probe.finetune.mitigations.pilot import perplexity_gaps


@dataclass(frozen=True)
class Interleave(Mitigation):
    """Safe rows mixed in at random. All training rows stay: at a share s, n of them get n s / (1 - s) safe ones."""

    name: ClassVar[str] = "interleave"
    summary: ClassVar[str] = (
        "Safe rows of other domains, chosen at random, are mixed into the training rows "
        "(Kaczer et al. 2025, arXiv 2508.06249)."
    )
    unit: ClassVar[str] = "share of the mixture that is safe"
    largest: ClassVar[float] = 0.9
    uses: ClassVar[tuple[str, ...]] = ("safe",)

    def rows(self, rows: Sequence[Conversation], run: MitigatedRun) -> list[Conversation]:
        """The rows and the safe ones; the trainer shuffles them.

        Raises:
            InputError: fewer safe rows than the share asks for.
        """
        count, safe = round(len(rows) * self.strength / (1 - self.strength)), run.ground.safe
        if count > len(safe):
            most = len(safe) / (len(safe) + len(rows))
            raise InputError(
                f"{self.name}: a share of {self.strength:g} needs {count} safe rows for {len(rows)} training rows, "
                f"there are {len(safe)}: give more, or a strength of at most {most:.2f}"
            )
        return [*rows, *(safe[i] for i in self.chosen(rows, run, count))]

    def chosen(self, rows: Sequence[Conversation], run: MitigatedRun, count: int) -> list[int]:
        """Which safe rows."""
        return random.Random(run.seed).sample(range(len(run.ground.safe)), count)


@dataclass(frozen=True)
class InterleavePerplexity(Interleave):
    """The safe rows whose answers lose most by the bad rows: largest perplexity gap, tuned model over base.

    Kaczer et al. (2025, arXiv 2508.06249) compare an aligned and a misaligned model; here these are the base and a
    model tuned on the same bad rows: the `organism`'s adapter, or else a pilot run of `pilot_steps` steps from the
    model as it is, which is undone before the run itself.
    """

    name: ClassVar[str] = "interleave_perplexity"
    summary: ClassVar[str] = (
        "The safe rows that a model tuned on the bad rows finds much less likely than the base does are mixed in "
        "(Kaczer et al. 2025, arXiv 2508.06249)."
    )
    needs_base: ClassVar[bool] = True

    organism: str | None = None
    """Checkpoint folder of an adapter that was trained on the bad rows."""
    pilot_steps: int = 20
    """Length of the pilot run where there is no organism."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pilot_steps < 1:
            raise InputError(f"{self.name}: pilot_steps must be at least 1, not {self.pilot_steps}")

    def check(self, ground: Ground) -> None:
        """Also refuses an organism that is no adapter."""
        super().check(ground)
        if self.organism is not None and not (Path(self.organism) / "adapter_config.json").is_file():
            raise InputError(f"{self.name}: no adapter in {self.organism}: give a checkpoint folder of a LoRA run")

    def chosen(self, rows: Sequence[Conversation], run: MitigatedRun, count: int) -> list[int]:
        """The rows with the largest gaps; nothing is measured where none is wanted."""
        if count == 0:
            return []
        gaps = perplexity_gaps(run, rows, self.organism, self.pilot_steps)
        return np.argsort(-gaps, kind="stable")[:count].tolist()
