"""The one interface of all mitigations: a frozen dataclass whose every method does nothing until overridden."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback

from persona_probe.config import Training
from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.finetune.extra import Inputs, Residuals
from persona_probe.finetune.mitigations.ground import PARTS, Ground, MitigatedRun
from persona_probe.finetune.sft import Fitted


@dataclass(frozen=True)
class Mitigation:
    """A way to fine-tune without waking the persona. At strength zero each trains bit for bit like none."""

    name: ClassVar[str] = ""
    """What configurations and tables call it."""
    summary: ClassVar[str] = ""
    """One sentence, with the paper."""
    unit: ClassVar[str] = ""
    """What `strength` means."""
    largest: ClassVar[float] = float("inf")
    """Largest strength that makes sense."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Parts of the ground without which it cannot work."""
    needs_base: ClassVar[bool] = False
    """Whether it looks at the base model while training: then the model must have an adapter to switch off."""

    strength: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= self.largest or self.strength == float("inf"):
            most = "" if self.largest == float("inf") else f" and at most {self.largest:g}"
            raise InputError(f"{self.name}: strength ({self.unit}) must be at least 0{most}, not {self.strength}")

    def check(self, ground: Ground) -> None:
        """Refuse a ground that lacks what this mitigation uses.

        Raises:
            InputError: says which part is missing.
        """
        for part in self.uses:
            if not ground.has(part):
                raise InputError(f"{self.name} needs {PARTS[part]}: pass Ground({part}=...)")

    def rows(self, rows: Sequence[Conversation], run: MitigatedRun) -> list[Conversation]:
        """The rows that are trained on instead of `rows`."""
        return list(rows)

    def training(self, training: Training) -> Training:
        """The settings that are trained with instead of `training`."""
        return training

    def forwards(self, model: nn.Module, ground: Ground) -> AbstractContextManager[object]:
        """Changes training forwards inside the block; forwards in eval mode see the plain model."""
        return nullcontext()

    def extra_rows(self, ground: Ground) -> Sequence[Conversation]:
        """Rows that stand by for `corrects`, prepared like the training rows."""
        return ()

    def corrects(self, run: MitigatedRun) -> bool:
        """Whether this step takes a batch of the extra rows instead of the task's; asked once a step."""
        return False

    def tapped(self, ground: Ground) -> int | None:
        """The decoder layer whose residuals `penalty` is given; None for none."""
        return None

    def penalty(
        self, run: MitigatedRun, step: int, inputs: Inputs, resid: Residuals | None
    ) -> Float[Tensor, ""] | None:
        """What is added to the loss of a training batch, its weight included, or None.

        Args:
            step: optimizer steps taken so far.
            inputs: the batch as the trainer has it.
            resid: the residuals of the tapped layer on that batch.
        """
        return None

    def callbacks(self, run: MitigatedRun) -> list[TrainerCallback]:
        """Callbacks that the run needs beside the caller's."""
        return []

    def after(
        self, run: MitigatedRun, folder: Path, callbacks: Sequence[TrainerCallback], progress: str | None
    ) -> Fitted | None:
        """What comes after the run, on the same model; None where nothing does."""
        return None

    def at_evaluation(self, model: nn.Module, ground: Ground) -> AbstractContextManager[object]:
        """Changes the finished model's forwards inside the block: for mitigations that act at inference."""
        return nullcontext()
