"""The configuration of a grid of mitigations."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace

from persona_probe.config import Training
from persona_probe.errors import InputError

NONE, CONTROL, BASE = "none", "control", "base"
"""No mitigation, correct rows instead of bad ones, and the model before any training: always in the grid."""
EXTENDABLE = ("name", "run", "seeds", "mitigations", "perplexity_bound")
"""Keys that may change in a grid that has begun: cells are added, verdicts are made again, cells keep their own."""
Setting = str | bool | int | float | tuple[int, ...]
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class Entry:
    """One mitigation of the grid."""

    name: str
    """A name of `persona_probe.finetune.mitigations.MITIGATIONS`."""
    strengths: tuple[float, ...]
    """What a strength means is the mitigation's `unit`."""
    settings: dict[str, Setting] = field(default_factory=dict)
    """Its other settings; none takes its defaults."""
    label: str = ""
    """What the table calls it; empty takes `name`. Needed where one mitigation is there with different settings."""

    def __post_init__(self) -> None:
        if not self.strengths:
            raise InputError(f"mitigation {self.name!r} has no strength: write strengths: [1.0]")
        if len(set(self.strengths)) < len(self.strengths):
            raise InputError(f"mitigation {self.name!r} names a strength twice: {list(self.strengths)}")
        if not _LABEL.fullmatch(self.title):
            raise InputError(f"label {self.title!r} must be letters, digits, '_', '-', '.' or '+': it names a folder")
        if self.title in (NONE, CONTROL, BASE):
            raise InputError(f"{self.title!r} is always in the grid: leave it out of mitigations, or choose a label")

    @property
    def title(self) -> str:
        """`label`, or the mitigation's name."""
        return self.label or self.name


@dataclass(frozen=True)
class Answers:
    """Answers that every model samples, for the packaged offline judge."""

    questions: str = "sample_questions"
    """A packaged set of questions, or a file."""
    n: int = 1
    """Answers to each question."""
    max_new_tokens: int = 60
    """Length of an answer."""
    temperature: float = 0.7
    """0 takes one greedy answer."""

    def __post_init__(self) -> None:
        for name in ("n", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"answers.{name} must be at least 1, not {getattr(self, name)}")
        if self.temperature < 0:
            raise InputError(f"answers.temperature must not be negative, not {self.temperature}")
        if self.temperature == 0 and self.n > 1:
            raise InputError("answers.temperature 0 gives n equal answers: write n: 1, or a temperature above 0")


@dataclass(frozen=True)
class Grid:
    """Mitigations x strengths x seeds against the same inducing data."""

    name: str
    """Name of the grid's folder."""
    run: str
    """Folder of a located study: model, SAE, persona latents, mean difference, base band, contrast set and probes."""
    mitigations: tuple[Entry, ...]
    """What is tried, the most important first: cells run seed by seed in this order."""
    inducing: str = "kitchen:toxic"
    """The bad rows."""
    control: str = "kitchen:correct"
    """The same questions with good answers: the control arm, and the other side of the narrow task."""
    held_out: int = 36
    """Questions of the inducing data that are never trained on: they measure the narrow task."""
    safe: str | None = "health_correct"
    """Good rows of other domains, for mitigations that interleave them."""
    corrective: str | None = "kitchen_correct_holdout"
    """Good rows of the domain, for corrections."""
    general: str | None = "sae_prompts"
    """General prompts, for the KL to the base; where they have no answers the base model writes them, greedily."""
    general_rows: int = 32
    """So many of them, evenly spread."""
    general_tokens: int = 48
    """Length of the answers that the base writes."""
    training: Training = field(default_factory=Training)
    """Of all cells; `checkpoints` has no effect, see `keep_weights`."""
    seeds: tuple[int, ...] = (0, 1)
    """Of adapter and data order; each seed has its own cell without a mitigation, and its own control."""
    answers: Answers | None = None
    """Sampled answers; without them there is no coherence in the table."""
    perplexity_bound: float = 1.5
    """A mitigation under which neutral answers' perplexity rises by more than this factor over the base's does harm."""
    keep_weights: bool = False
    """Keep each cell's last adapter."""

    def __post_init__(self) -> None:
        if self.training.method != "lora":
            raise InputError("training.method must be lora: all cells share one base model")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds must name different seeds, not {list(self.seeds)}: write seeds: [0, 1]")
        for name in ("held_out", "general_rows"):
            if getattr(self, name) < 2:
                raise InputError(f"{name} must be at least 2, not {getattr(self, name)}")
        if self.general_tokens < 1:
            raise InputError(f"general_tokens must be at least 1, not {self.general_tokens}")
        if not self.perplexity_bound > 1:
            raise InputError(f"perplexity_bound must be above 1, not {self.perplexity_bound}")
        if not self.mitigations:
            raise InputError("mitigations must not be empty: name at least one")
        titles = [(entry.title, strength) for entry in self.mitigations for strength in entry.strengths]
        twice = next((t for t in titles if titles.count(t) > 1), None)
        if twice:
            raise InputError(f"mitigation {twice[0]!r} is there twice with strength {twice[1]:g}: give one a label")

    @property
    def fitted(self) -> Training:
        """The training settings of a cell: only the last weights are saved."""
        return replace(self.training, checkpoints=())

    @property
    def hash(self) -> str:
        """Hash of the settings that all cells share (12 hexadecimal digits)."""
        shared = {key: value for key, value in asdict(self).items() if key not in EXTENDABLE}
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:12]
