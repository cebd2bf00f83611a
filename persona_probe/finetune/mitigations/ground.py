"""What mitigations may draw on, and one mitigated run as they see it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from persona_probe.config import Training
from persona_probe.data.chat import Conversation
from persona_probe.finetune.sft import Fitted
from persona_probe.monitor.bands import Band


@dataclass(frozen=True, eq=False)
class Ground:
    """What mitigations may draw on. All but tokenizer and layer is optional: `check` says what a mitigation lacks."""

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
        """Whether a part is there, and not empty."""
        value = getattr(self, part)
        return bool(len(value)) if isinstance(value, Sequence) else value is not None

    @property
    def persona(self) -> int | Tensor | None:
        """What stands for the persona in readings: its latent where there is an SAE, else the direction."""
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
"""The optional parts of a ground, in words."""


@dataclass(eq=False)
class MitigatedRun:
    """One run: what stays the same, and the little that changes while it trains."""

    model: nn.Module
    ground: Ground
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
    """Extra loss at each step, its weight included; `losses` include it too. Empty where there is none."""
    corrected: list[int]
    """Steps (from 1) that trained on a corrective batch."""
    readings: list[tuple[int, float]]
    """Step and mean of the persona feature, where the mitigation itself watched it."""
