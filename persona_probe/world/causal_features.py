"""What is tested for cause in a world: true latents, pairs and sets of them, true directions, and random latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from persona_probe.config import Locate
from persona_probe.data.tokens import conversation_batches
from persona_probe.latents.causal import Direction, random_latents
from persona_probe.saes.read import LatentMeans, read_latents_at
from persona_probe.world.directions import POSITIONS, directions_of
from persona_probe.world.labelled import Instruments
from persona_probe.world.signals import LATENT_TRUTHS
from persona_probe.world.truth import KnownChats, truth_table

SET = 5
"""Latents of a set."""


@dataclass(frozen=True)
class Feature:
    """A latent, a pair or set of latents, or a direction that is tested for cause."""

    name: str
    kind: str
    """`latent`, `pair`, `set`, `direction`, or `random` (a latent that is a control)."""
    vectors: Tensor
    """(members, d_model)."""
    latents: tuple[int, ...] = ()

    @property
    def push(self) -> Tensor:
        """The unit vector that is pushed along: the mean of the members' unit vectors, scaled."""
        total = (self.vectors / self.vectors.norm(dim=1, keepdim=True)).sum(dim=0)
        return total / total.norm()

    def members(self) -> list[Direction]:
        """As the causal test takes them."""
        return [Direction(f"{self.name}/{n}", "candidate", vector) for n, vector in enumerate(self.vectors)]


@dataclass(frozen=True)
class Tested:
    """What is tested, and the size of a push at each kind of tokens."""

    features: tuple[Feature, ...]
    controls: tuple[int, ...]
    """Random latents, matched in firing rate."""
    norms: Mapping[str, float]
    """Norm of the organism's mean shift over the control organism's, at the last prompt token and in the answer."""


def find_features(
    instruments: Instruments,
    domain: str,
    tuned: Mapping[str, LatentMeans],
    control: Mapping[str, LatentMeans],
    seed: int,
) -> Tested:
    """The true latents, pairs and sets of them, true directions, the organism's shift, and random latents.

    Args:
        domain: the organism's; its probes are left out.
        tuned: the organism on the probes, by position.
        control: the control organism on them.
    """
    known = KnownChats.draw()
    chats = conversation_batches(instruments.tokenizer, known.chats, 64)
    told = read_latents_at(instruments.model, instruments.sae, chats, instruments.layer, POSITIONS, bf16=False)
    outside = instruments.outside(domain)
    shifts = {
        where: (tuned[where].resid[outside].mean(axis=0) - control[where].resid[outside].mean(axis=0))
        for where in POSITIONS
    }
    features = _features(decoder_of(instruments), known, told, shifts)
    firing = pd.Series(told["response"].firing.mean(axis=0))
    tested = sorted({latent for one in features for latent in one.latents})
    live = int((firing.drop(index=tested) > 0).sum())
    controls = random_latents(firing, tested, min(Locate().random_latents, live), seed)
    return Tested(tuple(features), tuple(controls), {name: float(np.linalg.norm(x)) for name, x in shifts.items()})


def _features(
    decoder: Tensor, known: KnownChats, told: Mapping[str, LatentMeans], shifts: Mapping[str, np.ndarray]
) -> list[Feature]:
    best: dict[tuple[str, str], list[int]] = {}
    for where, means in told.items():
        truths = truth_table(known, means.mean)
        for name, truth in LATENT_TRUTHS.items():
            best[name, where] = truths.loc[truths["truth"] == truth, "latent"].head(SET).tolist()
    wanted: dict[tuple[int, ...], tuple[str, str]] = {}
    for (name, where), latents in best.items():
        wanted.setdefault((latents[0],), (f"{name} latent, {where}", "latent"))
    for where in POSITIONS:
        pair = (best["harm", where][0], best["rude", where][0])
        wanted.setdefault(pair, (f"harm and rude latents, {where}", "pair"))
    for (name, where), latents in best.items():
        wanted.setdefault(tuple(latents), (f"{SET} {name} latents, {where}", "set"))
    features = [of_latents(decoder, name, kind, latents) for latents, (name, kind) in wanted.items()]
    for where, means in told.items():
        named = {**directions_of(known, means), "organism's": shifts[where]}
        for name, vector in named.items():
            row = torch.tensor(np.asarray(vector, np.float32))[None]
            features.append(Feature(f"{name} direction, {where}", "direction", row))
    return features


def of_latents(decoder: Tensor, name: str, kind: str, latents: Sequence[int]) -> Feature:
    """Latents as a feature: their decoder rows."""
    return Feature(name, kind, decoder[list(latents)], tuple(latents))


def decoder_of(instruments: Instruments) -> Tensor:
    """The SAE's decoder (latents, d_model), in float32."""
    return instruments.sae.W_dec.detach().float().cpu()
