"""The one interface of all mitigations: a frozen dataclass whose every method does nothing until overridden."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from persona_probe.config import Training
from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.finetune.sft import Fitted
from persona_probe.finetune.trainer import Inputs, Residuals
from persona_probe.monitor.band import Band

# --- The inputs of mitigations, and one mitigated run as they see it


@dataclass(frozen=True, eq=False)
class MitigationInputs:
    """What mitigations may use. All but tokenizer and layer is optional; `check` reports what a mitigation lacks."""

    tokenizer: PreTrainedTokenizerBase
    layer: int
    """Decoder layer at whose output the persona is read, pushed and projected out."""
    sae: Any | None = None
    """A `sae_lens.SAE` of that layer."""
    latents: tuple[int, ...] = ()
    """Latents of the SAE to keep down, the persona first."""
    direction: Float[Tensor, " d_model"] | None = None
    """Mean activation of the incorrect minus the correct arm at `layer`, at its raw norm: the unit `x_delta`."""
    safe: Sequence[Conversation] = ()
    """Answered rows of other domains, to interleave."""
    corrective: Sequence[Conversation] = ()
    """Well answered rows of the training's domain; never evaluation questions."""
    general: Sequence[Conversation] = ()
    """General prompts with neutral answers, for the KL."""
    band: Band | None = None
    """Base band of the persona feature's mean over `probes` (the first latent; without an SAE, the direction)."""
    probes: Sequence[Conversation] = ()
    """What the persona is read on."""
    positions: str | None = None
    """Tokens of the probes that are averaged over; None takes what `FeatureMonitor` takes."""

    def has(self, part: str) -> bool:
        """Whether an input is given, and not empty."""
        value = getattr(self, part)
        return bool(len(value)) if isinstance(value, Sequence) else value is not None

    @property
    def persona(self) -> int | Tensor | None:
        """The persona in readings: its latent if there is an SAE, else the direction."""
        return self.latents[0] if self.sae is not None and self.latents else self.direction


PARTS = {
    "sae": "an SAE",
    "latents": "the latents to keep down",
    "direction": "the persona's direction",
    "safe": "safe rows of other domains",
    "corrective": "corrective rows",
    "general": "general prompts with neutral answers",
    "band": "the persona feature's base band",
    "probes": "probes to read the persona on",
}
"""The optional inputs, in words."""


@dataclass(eq=False)
class MitigatedRun:
    """One run: what stays the same, and the little that changes while it trains."""

    model: nn.Module
    inputs: MitigationInputs
    training: Training
    seed: int
    correcting: bool = False
    """Alternating: whether the persona is above its band."""
    above: int = 0
    """Alternating: steps so far that began above it."""
    penalties: list[float] = field(default_factory=list)
    corrected: list[int] = field(default_factory=list)
    readings: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class MitigatedFit(Fitted):
    """What a mitigated run leaves. Losses and rows include a correction that came after it."""

    penalties: list[float]
    """Extra loss at each step, its weight included; `losses` include it too. Empty if there is none."""
    corrected: list[int]
    """Steps (from 1) that trained on a corrective batch."""
    readings: list[tuple[int, float]]
    """Step and mean of the persona feature, where the mitigation itself watched it."""


@dataclass(frozen=True)
class Mitigation:
    """A way to fine-tune without misaligning the model. At strength zero each trains bit for bit like `none`."""

    name: ClassVar[str] = ""
    """What configurations and tables call it."""
    summary: ClassVar[str] = ""
    """One sentence, with the paper."""
    unit: ClassVar[str] = ""
    """What `strength` means."""
    largest: ClassVar[float] = float("inf")
    """Largest strength that makes sense."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Inputs without which it cannot work."""
    needs_base: ClassVar[bool] = False
    """Whether it looks at the base model while training: then the model must have an adapter to switch off."""

    strength: float = 0.0

    @property
    def steers(self) -> bool:
        """Whether the finished model is steered or ablated whenever it is used."""
        return self.strength > 0 and type(self).at_evaluation is not Mitigation.at_evaluation

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= self.largest or self.strength == float("inf"):
            most = "" if self.largest == float("inf") else f" and at most {self.largest:g}"
            raise InputError(f"{self.name}: strength ({self.unit}) must be at least 0{most}, not {self.strength}")

    def check(self, inputs: MitigationInputs) -> None:
        """Refuse inputs that lack what this mitigation uses.

        Raises:
            InputError: says which part is missing.
        """
        for part in self.uses:
            if not inputs.has(part):
                raise InputError(f"{self.name} needs {PARTS[part]}: pass MitigationInputs({part}=...)")

    def rows(self, rows: Sequence[Conversation], run: MitigatedRun) -> list[Conversation]:
        """The rows that are trained on instead of `rows`."""
        return list(rows)

    def training(self, training: Training) -> Training:
        """The settings that are trained with instead of `training`."""
        return training

    def forwards(self, model: nn.Module, inputs: MitigationInputs) -> AbstractContextManager[object]:
        """Changes training forwards inside the block; forwards in eval mode see the plain model."""
        return nullcontext()

    def extra_rows(self, inputs: MitigationInputs) -> Sequence[Conversation]:
        """Rows for the batches that `corrects` asks for, prepared like the training rows."""
        return ()

    def corrects(self, run: MitigatedRun) -> bool:
        """Whether this step takes a batch of the extra rows instead of the task's; asked once a step."""
        return False

    def tapped(self, inputs: MitigationInputs) -> int | None:
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
        """Callbacks that the run needs besides the caller's."""
        return []

    def after(
        self, run: MitigatedRun, folder: Path, callbacks: Sequence[TrainerCallback], progress: str | None
    ) -> Fitted | None:
        """What comes after the run, on the same model; None where nothing does."""
        return None

    def at_evaluation(self, model: nn.Module, inputs: MitigationInputs) -> AbstractContextManager[object]:
        """Changes the finished model's forwards inside the block: for mitigations that act at inference."""
        return nullcontext()
