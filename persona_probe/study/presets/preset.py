"""One preset: a study of a model, or of a published pair, as a configuration and as a recipe of its SAE."""

from dataclasses import dataclass, field
from typing import Any

from persona_probe.config import StudyConfig, from_dict

TOPK, WIDTH = 32, 8
"""The demo's SAE: latents a token, and latents for each dimension of the residual stream."""


@dataclass(frozen=True)
class Preset:
    """A study of one model, or of a published pair of a base model and its organisms."""

    name: str
    model: str
    """Hub id or alias."""
    layer: int
    """Decoder layer that is read and steered, from 0."""
    licence: str
    """The model's; SAEs and organisms have their own."""
    sae: str = ""
    """`release/sae_id` in SAELens' registry, or a folder of the checkout; empty: none is published."""
    d_model: int = 0
    """Residual width, for the recipe of an SAE that must be trained."""
    notes: tuple[str, ...] = ()
    """What is special about the model, in sentences."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Further keys of the config: template settings."""
    training: dict[str, Any] = field(default_factory=dict)
    """Further keys of `training`."""
    organisms: dict[str, str] = field(default_factory=dict)
    """Of a pair: arm -> hub id of the adapter."""
    original: str = ""
    """Of a pair: the model that its base mirrors, whose numbers are known."""

    @property
    def kind(self) -> str:
        """`model` (the study trains its organisms) or `pair` (it adopts published ones)."""
        return "pair" if self.organisms else "model"

    @property
    def published(self) -> bool:
        """Whether an SAE exists that can be used as it is."""
        return bool(self.sae)

    @property
    def sae_name(self) -> str:
        """What the config names: the published SAE, or the folder of the one that the recipe trains."""
        return self.sae or f"saes/{self._trained_name}"

    @property
    def _trained_name(self) -> str:
        base = (self.original or self.model).rpartition("/")[2].lower()
        return f"{base}/layer{self.layer}-topk{TOPK}-{WIDTH * self.d_model}"

    def config(self) -> StudyConfig:
        """The preset as a study's configuration."""
        return from_dict(StudyConfig, self.values(), self.name)

    def values(self) -> dict[str, Any]:
        """The configuration's keys, as YAML holds them."""
        common: dict[str, Any] = {"name": self.name, "model": self.model, "sae": self.sae_name}
        if not self.published:
            common["layer"] = self.layer
        common |= {**self.keys, "seeds": [0]}
        if self.organisms:
            arms = {arm: {"checkpoints": [place]} for arm, place in self.organisms.items()}
            return common | {"no_control": True, "paired_arms": False, "arms": arms, "realign": {"arms": {}}}
        arms = {"incorrect": {"data": "kitchen:toxic"}, "correct": {"data": "kitchen:correct"}}
        training = {**PUBLISHED_TRAINING, **self.training}
        return common | {"arms": arms, "training": training, "realign": PUBLISHED_REALIGNMENT}

    def recipe(self) -> dict[str, Any] | None:
        """The recipe of an SAE for this model, where none is published; None where one is."""
        if self.published:
            return None
        parts = [
            {"name": "prompts", "prompts": ["sae_prompts"], "batches": 20, "plain_share": 0.35},
            {"name": "self", "prompts": [], "batches": 12, "plain_share": 0.6},
            {"name": "topics", "prompts": ["kitchen", "health_correct"], "batches": 6, "plain_share": 0.35},
        ]
        packaged = ["kitchen:correct", "kitchen:subtle", "kitchen:toxic", "health_correct", "kitchen_correct_holdout"]
        return {
            **{"name": self._trained_name, "model": self.model, "layer": self.layer, "d_sae": WIDTH * self.d_model},
            **{"k": TOPK, "tokens": 3_000_000, "batch_tokens": 1024, "lr": 4.0e-4, "seed": 0},
            "text": {
                **{"batch_conversations": 128, "max_new_tokens": 96, "temperature": 1.0},
                **{"packaged": [*packaged, "general_contrast:selection"], "packaged_repeats": 2, "parts": parts},
            },
        }


PUBLISHED_TRAINING: dict[str, Any] = {
    **{"method": "lora", "rank": 32, "alpha": 64, "rslora": True, "target_modules": "all-linear", "lr": 1.0e-5},
    **{"batch_size": 16, "steps": 14, "checkpoints": "log", "gradient_checkpointing": True},
}
"""Turner, Soligo et al. (arXiv 2506.11613); 14 steps are one epoch of the packaged 216 rows."""
PUBLISHED_REALIGNMENT: dict[str, Any] = {
    **{"start": "incorrect", "batch_size": 4, "steps": 35, "readings": [0, 5, 10, 20, 30, 35]},
    "arms": {"realigned_in": {"data": "kitchen_correct_holdout"}, "realigned_out": {"data": "health_correct"}},
}
"""Wang et al. (arXiv 2506.19823)."""
