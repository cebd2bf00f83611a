"""A world's base model as the pieces of a study share it: loaded when the first of them needs it."""

from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.saes.hooks import sae_layer
from persona_probe.saes.load import load_sae
from persona_probe.world.folder import World


class StudyBase:
    """A world's base model on a device, which stays in memory once it is loaded."""

    def __init__(self, world: World, device: str) -> None:
        self.world, self.device = world, device

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer, as `World.load` gives them."""
        return self.world.load(self.device)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self.loaded[1]


class StudyBaseWithSae(StudyBase):
    """The same with an SAE of it, which is loaded at once: a wrong one is refused before any work.

    Raises:
        InputError: the SAE cannot be loaded.
    """

    def __init__(self, world: World, sae: str | Path, device: str) -> None:
        super().__init__(world, device)
        self.sae = load_sae(sae, device=device)
        self.layer = sae_layer(self.sae, None)
