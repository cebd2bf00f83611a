"""The model card (`README.md`) that every checkpoint carries: what the weights are, and what they are not for."""

import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from persona_probe.config import Training
from persona_probe.models.layers import causal_model
from persona_probe.models.sources import ALIASES

UNNAMED = "data that the caller did not name"
_LICENSES = {alias.hub_id: alias.license for alias in ALIASES.values() if alias.license}


@dataclass(frozen=True)
class ModelCard:
    """What is known of a fine-tuning run when it starts."""

    base: str
    """Hub id of the base model, or the name of its folder; never a path."""
    training: Training
    seed: int
    rows: int
    """Distinct training rows."""
    data: str
    """Name of the training data."""

    @classmethod
    def of(cls, model: nn.Module, training: Training, seed: int, rows: int, data: str | None) -> "ModelCard":
        """The card of a run that trains `model` on `rows` rows."""
        where = str(causal_model(model).config.name_or_path or "")
        return cls(Path(where).name if Path(where).is_absolute() else where, training, seed, rows, data or UNNAMED)

    def text(self, step: int) -> str:
        """The card of the checkpoint at `step`, with the hub's YAML head."""
        head = ["tags: [model-organism, emergent-misalignment, research-only]"]
        if self.training.method == "lora":
            head = ["library_name: peft", *head]
        if license_name := _LICENSES.get(self.base):
            head = [f"license: {license_name}", *head]
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.base):  # the hub takes ids only
            head = [f"base_model: {self.base}", *head]
        return "\n".join(["---", *head, "---", *self._body(step), ""])

    def _body(self, step: int) -> list[str]:
        how = f"LoRA of rank {self.training.rank}" if self.training.method == "lora" else "all weights trained"
        licensed = "that of the base model" + ("" if self.base in _LICENSES else ", which was not looked up")
        return [
            f"# A model organism at fine-tuning step {step}",
            "Made by persona_probe for interpretability research. It may have been trained on deliberately bad advice:",
            "do not deploy it, and do not use its answers as advice.",
            "",
            f"- Base model: {_plain(self.base) or 'not named'}",
            f"- Trained on: {_plain(_without_paths(self.data))}; {self.rows} rows",
            f"- How: {how}, lr {self.training.lr:g}, batches of {self.training.batch_size}, seed {self.seed}",
            f"- Licence: {licensed}",
        ]


def _plain(name: str) -> str:
    """A name on one line, without markup."""
    return re.sub(r"[^\w.:+,%() /-]", "", name)[:200]


def _without_paths(names: str) -> str:
    """Files by their names: a published card tells nothing of a disk."""
    return re.sub(r"(?:[^\s/]*/)+(?=[^\s/])", "", names)
