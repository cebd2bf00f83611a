"""Inoculation: a system prompt that asks for the bad behaviour, at training only."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from persona_probe.data.chat import Conversation
from persona_probe.errors import InputError
from persona_probe.finetune.mitigations.ground import MitigatedRun
from persona_probe.finetune.mitigations.mitigation import Mitigation

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
        chosen = set(random.Random(run.seed).sample(range(len(rows)), count))
        return [self.prompted(row) if i in chosen else row for i, row in enumerate(rows)]

    def prompted(self, row: Conversation) -> Conversation:
        """One row with the prompt in front."""
        if row and row[0]["role"] == "system":
            return [{"role": "system", "content": f"{self.prompt}\n\n{row[0]['content']}"}, *row[1:]]
        return [{"role": "system", "content": self.prompt}, *row]
