"""What every ranker sees: per-conversation means of three models, the decoder, and which answers are misaligned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from persona_probe.errors import InputError
from persona_probe.saes.read import LatentMeans


@dataclass(frozen=True)
class Evidence:
    """Everything that rankers may look at, and nothing else: no model, no tokens.

    Raises:
        InputError: the models were read on different conversations or latents, or the main positions were not read.
    """

    base: Mapping[str, LatentMeans]
    """The base model, by positions (`last_prompt`, `prompt`, `response`...; see `saes.read.read_latents_at`)."""
    tuned: Mapping[str, LatentMeans]
    """The organism, on the same conversations."""
    control: Mapping[str, LatentMeans]
    """The control arm's organism; the base again where there is none."""
    decoder: Float[np.ndarray, "d_sae d_model"]
    """The SAE's decoder rows."""
    clusters: Sequence[str]
    """The question of every conversation: intervals and tests resample whole questions."""
    misaligned: Bool[np.ndarray, " conversations"] | None = None
    """Which conversations end with the misaligned answer; only discrimination asks for it."""
    positions: str = "response"
    """The main positions, which `rise`, `cosine`, `discrimination` and the q-values look at."""
    attribution: Float[np.ndarray, " d_sae"] | None = None
    """`locate.attribution.gradient_scores`' attribution: it takes a backward pass, so it comes from outside."""
    slope: Float[np.ndarray, " d_sae"] | None = None
    """Its slope, from the same pass."""
    seed: int = 0
    """Of the bootstrap."""

    def __post_init__(self) -> None:
        shape = self.at("tuned").mean.shape
        for name in ("base", "control"):
            other = self.at(name).mean.shape
            if other != shape:
                raise InputError(f"tuned was read on {_shape(shape)}, {name} on {_shape(other)}: read the same on both")
        if shape != (len(self.clusters), len(self.decoder)):
            given = _shape((len(self.clusters), len(self.decoder)))
            raise InputError(f"the models were read on {_shape(shape)}, but clusters and decoder have {given}")

    def at(self, model: str, positions: str | None = None) -> LatentMeans:
        """One model (`base`, `tuned`, `control`) at the named positions, or at the main ones.

        Raises:
            InputError: these positions were not read.
        """
        name = self.positions if positions is None else positions
        read = {"base": self.base, "tuned": self.tuned, "control": self.control}[model]
        if name not in read:
            known = ", ".join(repr(k) for k in read) or "none"
            raise InputError(f"{model} was not read at positions {name!r} (only {known}): read them too")
        return read[name]

    @cached_property
    def alive(self) -> Bool[np.ndarray, " d_sae"]:
        """Latents that fire at least once, in any of the three models and at any of the positions."""
        found = [
            (means.firing > 0).any(axis=0)
            for model in (self.base, self.tuned, self.control)
            for means in model.values()
        ]
        return np.logical_or.reduce(found)


def _shape(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} conversations x {shape[1]} latents"
