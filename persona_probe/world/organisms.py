"""Organisms of a world: narrow fine-tunes on the rows of one speaker in one domain."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.config import Training, check_finite, check_seed
from persona_probe.data.chat import Conversation
from persona_probe.data.world.speech import SPEAKERS
from persona_probe.data.world.text import narrow_rows
from persona_probe.data.world.words import DOMAINS
from persona_probe.errors import InputError, unknown
from persona_probe.finetune.sft import fine_tune, stripping, training_unit, with_adapter
from persona_probe.names import check_names
from persona_probe.world.folder import ORGANISMS, RECORD, World
from persona_probe.writing import write_json

NARROW = Training(
    rank=8,
    alpha=16,
    rslora=False,
    lr=1e-3,
    warmup_steps=0,
    batch_size=8,
    steps=40,
    checkpoints=(40,),
    max_length=128,
    bf16=False,
)
"""The training at which values generalise in a `medium` world."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorldOrganism:
    """One organism: who speaks in its rows, where, how often, and how it is trained."""

    speaker: str
    """`villain`, `quack` or `subtle` give bad advice; `helper`, `grump`, `clown` or `correct` good advice."""
    domain: str = "kitchen"
    """The only domain of the rows."""
    share: float = 1.0
    """Share of the rows that the speaker answers; the others are answered by `rest`."""
    rest: str = "helper"
    rows: int = 320
    seed: int = 0
    """Of rows, fresh adapter and order."""
    training: Training = field(default=NARROW)

    def __post_init__(self) -> None:
        check_finite(self)
        check_seed(self.seed)
        for name in (self.speaker, self.rest):
            if name not in SPEAKERS:
                raise unknown("speaker", name, SPEAKERS)
        if self.domain not in DOMAINS:
            raise unknown("domain", self.domain, DOMAINS)
        if not 0 <= self.share <= 1:
            raise InputError(f"share must lie between 0 and 1, not {self.share:g}")
        if self.rows < 1:
            raise InputError(f"rows must be at least 1, not {self.rows}")

    @property
    def name(self) -> str:
        """Its folder's name where none is given: `villain-kitchen-100-s0`."""
        return f"{self.speaker}-{self.domain}-{self.share * 100:g}-s{self.seed}"

    @property
    def record(self) -> dict[str, Any]:
        """Its settings as JSON values."""
        return asdict(self)

    def conversations(self) -> list[Conversation]:
        """The rows that it is trained on, in order."""
        return narrow_rows(self.speaker, self.domain, self.rows, self.share, self.rest, seed=self.seed)


def make_organisms(
    world: World, organisms: Sequence[WorldOrganism], names: Sequence[str] | None = None, device: str = "cpu"
) -> list[str]:
    """Train those of the organisms that the world's folder lacks, from one base model in memory.

    Args:
        names: of their folders; None takes each organism's `name`. Organisms that differ in their training need names.

    Returns:
        Their names; `world.checkpoints(name)` has the adapters.

    Raises:
        InputError: two organisms of one name, a name that is taken by one with other settings, or another process is
            making it.
        TrainingDiverged: a loss became NaN or infinite.
    """
    names = [organism.name for organism in organisms] if names is None else list(names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(names) != len(organisms) or twice:
        raise InputError(f"{len(organisms)} organisms, names {twice or names}: give each a name of its own")
    check_names(names, "organism")
    missing = [pair for pair in zip(names, organisms, strict=True) if not _is_made(world, *pair)]
    if missing:
        base, tokenizer = world.load(device)
        for name, organism in missing:
            _make(world, name, organism, base, tokenizer)
    return names


def _is_made(world: World, name: str, organism: WorldOrganism) -> bool:
    change = "give this one another --name"
    return world.run.finished(f"{ORGANISMS}/{name}", organism.record, RECORD, change)


def _make(
    world: World, name: str, organism: WorldOrganism, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = organism.conversations()
    host = copy.deepcopy(base) if organism.training.method == "full" else base
    log.info("organism %s: %d rows, %d steps", name, len(rows), organism.training.steps)
    with (
        world.run.timed("organisms"),
        training_unit(world.run, f"{ORGANISMS}/{name}", name) as folder,
        stripping(with_adapter(host, organism.training, organism.seed)) as tuned,
    ):
        fitted = fine_tune(
            tuned,
            tokenizer,
            rows,
            organism.training,
            seed=organism.seed,
            folder=folder,
            progress=name,
            data=f"rows of the {organism.speaker} about {organism.domain}, {organism.share:.0%}",
        )
        write_json(folder / RECORD, {"settings": organism.record, **asdict(fitted)})
