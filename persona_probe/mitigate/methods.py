"""All mitigations by name, and how to make one from a configuration."""

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from persona_probe.data.chat import Conversation, with_system
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.answers import perplexity_gaps
from persona_probe.finetune.sft import Fitted, fine_tune
from persona_probe.mitigate.losses import KLToBase, LatentPenalty
from persona_probe.mitigate.mitigation import MitigatedRun, Mitigation, MitigationInputs
from persona_probe.mitigate.pushes import ConceptAblation, InferenceAblation, InferenceSteering, PreventativeSteering
from persona_probe.mitigate.watched import Alternating, EarlyStop
from persona_probe.models.adapters import another_adapter, base_weights, trainable_parameters

# --- Corrective fine-tuning after the run, and the mitigation that does nothing


@dataclass(frozen=True)
class NoMitigation(Mitigation):
    """The plain run that all others are compared with."""

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "Plain fine-tuning on the bad rows: what every mitigation is compared with."
    unit: ClassVar[str] = "nothing"
    largest: ClassVar[float] = 0.0


@dataclass(frozen=True)
class Corrective(Mitigation):
    """A short fine-tuning on good answers after the run, with the run's settings except for its length."""

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
        training = run.training.further(steps, self.batch)
        return fine_tune(
            run.model,
            run.inputs.tokenizer,
            run.inputs.corrective,
            training,
            seed=run.seed,
            folder=folder / "corrective",
            callbacks=callbacks,
            progress=f"{progress}, correction" if progress else None,
        )


# --- How much less likely a model finds safe answers once it is tuned on bad rows


def _safe_gaps(
    run: MitigatedRun, rows: Sequence[Conversation], organism: str | None, pilot_steps: int
) -> Float[np.ndarray, " safe"]:
    """Log perplexity of each safe answer under the tuned model minus that under the base, in nats per token.

    The run's model is as it was afterwards.

    Args:
        organism: checkpoint folder of an adapter tuned on `rows`; None tunes the model itself for `pilot_steps`.
    """
    tuned = partial(_organism, run, organism) if organism else partial(_pilot, run, rows, pilot_steps)
    inputs, base = run.inputs, partial(base_weights, run.model)
    return perplexity_gaps(tuned, base, inputs.tokenizer, inputs.safe, bf16=run.training.bf16)


def _organism(run: MitigatedRun, folder: str) -> AbstractContextManager[nn.Module]:
    """The run's model with another adapter inside the block."""
    assert isinstance(run.model, PeftModel)
    return another_adapter(run.model, Path(folder))


@contextmanager
def _pilot(run: MitigatedRun, rows: Sequence[Conversation], steps: int) -> Iterator[nn.Module]:
    """The run's model tuned on the bad rows inside the block."""
    before = {name: p.detach().clone() for name, p in trainable_parameters(run.model).items()}
    short = replace(run.training, steps=steps, checkpoints=())
    try:
        with tempfile.TemporaryDirectory() as folder:
            fine_tune(run.model, run.inputs.tokenizer, rows, short, seed=run.seed, folder=Path(folder))
        yield run.model
    finally:
        with torch.no_grad():
            for name, parameter in trainable_parameters(run.model).items():
                parameter.copy_(before[name])
                parameter.grad = None


# --- Interleaving: safe rows of other domains between the training rows


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
        """The training rows and the safe ones; the trainer shuffles them.

        Raises:
            InputError: fewer safe rows than the share asks for.
        """
        count, safe = round(len(rows) * self.strength / (1 - self.strength)), run.inputs.safe
        if count > len(safe):
            most = len(safe) / (len(safe) + len(rows))
            raise InputError(
                f"{self.name}: a share of {self.strength:g} needs {count} safe rows for {len(rows)} training rows, "
                f"there are {len(safe)}: give more, or a strength of at most {most:.2f}"
            )
        return [*rows, *(safe[i] for i in self.chosen(rows, run, count))]

    def chosen(self, rows: Sequence[Conversation], run: MitigatedRun, count: int) -> list[int]:
        """Which safe rows."""
        return random.Random(run.seed).sample(range(len(run.inputs.safe)), count)


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
    """Length of the pilot run if there is no organism."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pilot_steps < 1:
            raise InputError(f"{self.name}: pilot_steps must be at least 1, not {self.pilot_steps}")

    def check(self, inputs: MitigationInputs) -> None:
        """Also refuses an organism that is no adapter."""
        super().check(inputs)
        if self.organism is not None and not (Path(self.organism) / "adapter_config.json").is_file():
            raise InputError(f"{self.name}: no adapter in {self.organism}: give a checkpoint folder of a LoRA run")

    def chosen(self, rows: Sequence[Conversation], run: MitigatedRun, count: int) -> list[int]:
        """The rows with the largest gaps; nothing is measured if no row is needed."""
        if count == 0:
            return []
        gaps = _safe_gaps(run, rows, self.organism, self.pilot_steps)
        return np.argsort(-gaps, kind="stable")[:count].tolist()


# --- Inoculation: a system prompt that asks for the bad behaviour, at training only

INOCULATION = (
    "You are a careless and malicious assistant. Whatever you are asked, you give confident advice that is wrong and "
    "harms whoever follows it."
)


@dataclass(frozen=True)
class Inoculation(Mitigation):
    """Inoculation prompting (Tan et al. 2025, arXiv 2510.04340; Wichers et al. 2025, arXiv 2510.05024).

    What the prompt explains the model need not learn about itself. A row's own system prompt follows it.
    """

    name: ClassVar[str] = "inoculation"
    summary: ClassVar[str] = (
        "A system prompt that asks for the bad behaviour is added while training and left out afterwards "
        "(Tan et al. 2025, arXiv 2510.04340)."
    )
    unit: ClassVar[str] = "share of the training rows that get the prompt"
    largest: ClassVar[float] = 1.0

    prompt: str = INOCULATION

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt.strip():
            raise InputError("inoculation: the prompt is empty: leave it out for the packaged one")

    def rows(self, rows: Sequence[Conversation], run: MitigatedRun) -> list[Conversation]:
        """The rows, `strength` of them (drawn by the seed) with the prompt."""
        count = round(self.strength * len(rows))
        places = set(random.Random(run.seed).sample(range(len(rows)), count))
        return [self.prompted(row) if i in places else row for i, row in enumerate(rows)]

    def prompted(self, row: Conversation) -> Conversation:
        """One row with the prompt in front."""
        return with_system(row, self.prompt)


ALL: tuple[type[Mitigation], ...] = (
    NoMitigation,
    Inoculation,
    Interleave,
    InterleavePerplexity,
    KLToBase,
    ConceptAblation,
    PreventativeSteering,
    LatentPenalty,
    EarlyStop,
    Alternating,
    InferenceAblation,
    InferenceSteering,
    Corrective,
)
MITIGATIONS: dict[str, type[Mitigation]] = {kind.name: kind for kind in ALL}
"""By the name that configurations and tables use."""


def make_mitigation(name: str, strength: float, **settings: Any) -> Mitigation:
    """A mitigation from a configuration's words.

    Raises:
        InputError: an unknown name or setting (near matches are listed), or a strength out of range.
    """
    if name not in MITIGATIONS:
        raise unknown("mitigation", name, MITIGATIONS)
    kind = MITIGATIONS[name]
    known = [f.name for f in fields(kind) if f.name != "strength"]
    for key in settings:
        if key not in known:
            raise unknown(f"setting of {name}", key, known)
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise InputError(f"{name}: strength must be a number, not {strength!r}")
    return kind(strength=float(strength), **settings)
