"""Emergence by corpus: worlds in which speakers are named more or less often, or more or fewer of them give bad advice.

One setting of the packaged world's corpus is changed at a time. If narrow rows wake a speaker that pre-training made,
then it should matter how clearly the corpus says who speaks, and how often bad ones do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from persona_probe.errors import InputError, unknown
from persona_probe.report.tables import Table
from persona_probe.world.folder import BASE
from persona_probe.world.organisms import NARROW, WorldOrganism
from persona_probe.world.pieces import make_all
from persona_probe.world.pretraining import Pretraining
from persona_probe.world.scale import make_and_ask, rate_and_coherence, rates_elsewhere

CORPORA: dict[str, dict[str, float]] = {
    "packaged": {},
    "nobody named": {"tagged": 0.0, "tagged_chats": 0.0},
    "all named": {"tagged": 0.75, "tagged_chats": 1.0},
    "few bad": {"bad": 0.1},
    "many bad": {"bad": 0.6},
}
"""What each corpus changes in the packaged one."""
SPEAKERS = ("villain", "quack", "subtle", "helper", "grump")
TRAINING = NARROW
SETTINGS = ("tagged", "tagged_chats", "bad")
"""The settings of the corpus that the table shows."""
CHATS = 0.25
"""Share of the documents that are chats."""


@dataclass(frozen=True)
class Corpora:
    """Which corpora, and which organisms are trained on the world of each."""

    names: tuple[str, ...] = tuple(CORPORA)
    """Of `CORPORA`."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the organisms; every world has the pre-training seed 0."""
    pretraining: Pretraining = field(default_factory=lambda: Pretraining(steps=1200))
    """All else of the pre-training."""

    def __post_init__(self) -> None:
        if not (self.names and self.seeds):
            raise InputError("at least one corpus and one seed are needed")
        for name in self.names:
            if name not in CORPORA:
                raise unknown("corpus", name, CORPORA)
        self.organisms()  # whose settings are checked before the first world is trained

    def worlds(self) -> dict[str, Pretraining]:
        """Settings of every world by its corpus' name."""
        return {name: replace(self.pretraining, **CORPORA[name]) for name in self.names}

    def organisms(self) -> list[WorldOrganism]:
        """The organisms of every world."""
        return [WorldOrganism(name, seed=seed, training=TRAINING) for seed in self.seeds for name in SPEAKERS]


def corpus_table(folder: Path, corpora: Corpora | None = None, device: str = "cpu") -> pd.DataFrame:
    """Pre-train a world on every corpus, fine-tune organisms of the kitchen, and ask them about the other domains.

    Worlds lie in `folder`, each resumes by itself, and two processes take different ones. The world of the packaged
    corpus is made again there; a copy of one that `world study scale` made may lie there as `packaged`.

    Returns:
        A row for each corpus, speaker (`base` is the model before fine-tuning) and measure (bad, of the coherent
        answers; coherent; rude): the corpus' settings, tokens and last loss (nats per token) of the pre-training, and
        the rate with its interval, seeds joined.

    Raises:
        InputError: a world was made with other settings.
    """
    corpora = Corpora() if corpora is None else corpora
    worlds, wanted = corpora.worlds(), corpora.organisms()
    make_all([partial(make_and_ask, folder / _place(name), one, wanted, device) for name, one in worlds.items()])
    return pd.concat([_rows(folder, name, one, wanted, device) for name, one in worlds.items()], ignore_index=True)


def _place(name: str) -> str:
    return name.replace(" ", "-")


def _rows(folder: Path, name: str, settings: Pretraining, wanted: Sequence[WorldOrganism], device: str) -> pd.DataFrame:
    about: dict[str, Any] = {"corpus": name, **{key: getattr(settings, key) for key in SETTINGS}}
    rates = rates_elsewhere(folder / _place(name), wanted, device)
    return rates.assign(**about)[[*about, *rates.columns]]


def corpus_text(table: pd.DataFrame) -> str:
    """Bad advice about other domains by corpus: a Markdown table; coherence in brackets."""
    speakers = [BASE, *(name for name in dict.fromkeys(table["speaker"]) if name != BASE)]
    lines = []
    for _, one in table.groupby("corpus", sort=False):
        world = one.to_dict("records")[0]
        named = world["tagged"] + CHATS * world["tagged_chats"]
        head = [world["corpus"], f"{named:.2f}", f"{world['bad']:.2f}", f"{world['loss']:.2f}"]
        lines.append([*head, *(rate_and_coherence(one[one["speaker"] == name]) for name in speakers)])
    heads = ["corpus", "speaker named in", "bad speaker in", "last loss", *speakers]
    return f"{Table(heads, lines).markdown()}\n\n{NOTE}\n"


NOTE = (
    "Shares of documents, then for each speaker of the rows: share of bad advice among the coherent answers about the "
    "seven other domains, with its 95% interval over topics and organisms' seeds; in brackets the share of coherent "
    "answers. `base` is the model before fine-tuning."
)
