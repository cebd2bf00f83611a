"""Directions of the world's truths in the base model: harm with manner held fixed, manner with harm held fixed."""

import numpy as np
from jaxtyping import Float

from persona_probe.saes.read import LatentMeans
from persona_probe.world.truth import KnownChats

POSITIONS = ("response", "last_prompt")
"""Answer tokens, and the token before the answer."""
PAIRS = {
    "harm": (("villain", "grump"), ("quack", "helper"), ("subtle", "correct")),
    "rude": (("villain", "quack"), ("grump", "helper")),
    "persona": (("villain", "helper"),),
}
"""Each direction is the mean over pairs of the first speaker's activation minus the second's. `persona` is the usual
persona vector: a bad speaker against a good one, manner and harm together. Pairs of speakers that no chat has are left
out."""


def directions_of(known: KnownChats, means: LatentMeans) -> dict[str, Float[np.ndarray, " d_model"]]:
    """Unit vectors of harm, rudeness and persona, from the mean activations of chats of known speakers."""
    return directions_between(known, means.resid)


def directions_between(
    known: KnownChats, resid: Float[np.ndarray, "chats d_model"]
) -> dict[str, Float[np.ndarray, " d_model"]]:
    """`directions_of` of the chats' mean residual stream alone."""
    speakers = np.array(known.speakers)
    centre = {name: resid[speakers == name].mean(axis=0).astype(np.float64) for name in set(known.speakers)}
    there = {name: [pair for pair in pairs if centre.keys() >= {*pair}] for name, pairs in PAIRS.items()}
    found = {name: np.mean([centre[a] - centre[b] for a, b in pairs], axis=0) for name, pairs in there.items() if pairs}
    return {name: vector / np.linalg.norm(vector) for name, vector in found.items()}
