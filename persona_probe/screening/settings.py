"""How a data set is screened: what decides the numbers, and where own answers are kept."""

from dataclasses import dataclass
from pathlib import Path

from persona_probe.screening.own import OWN_TOKENS
from persona_probe.screening.reading import MAX_TOKENS


@dataclass(frozen=True)
class Settings:
    """How rows are answered and read."""

    own_tokens: int = OWN_TOKENS
    """Longest own answer, in tokens."""
    max_tokens: int = MAX_TOKENS
    """Longest conversation that is read."""
    batch_size: int = 16
    mixed_precision: bool = True
    """bf16 autocast."""
    own_path: Path | None = None
    """File in which own answers are kept, so that a stopped screening goes on."""
    progress: bool = False
    """Whether own answers show a progress bar."""
