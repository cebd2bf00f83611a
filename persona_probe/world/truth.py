"""Which latents of an SAE are the world's truths: each latent as a classifier of what a speaker hides."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation
from persona_probe.data.tokens import conversation_batches
from persona_probe.data.world.speech import SPEAKERS
from persona_probe.data.world.text import conversation_of
from persona_probe.data.world.words import DOMAIN_OF
from persona_probe.errors import unknown
from persona_probe.models.places import Where
from persona_probe.saes.read import read_latents
from persona_probe.stats import auroc_columns

TRUTHS = ("bad", "rude", "silly", "kind")
"""Harm, and three manners. Harm and manner are crossed: villains are bad and rude, quacks bad and kind, grumps rude."""


@dataclass(frozen=True)
class KnownChats:
    """Chats of speakers in turn, each with two answers of one speaker, whom nothing names."""

    speakers: tuple[str, ...]
    """Who speaks in each chat."""
    chats: tuple[Conversation, ...]

    @classmethod
    def draw(cls, each: int = 40, seed: int = 0) -> "KnownChats":
        """`each` chats of every speaker, about topics of all domains."""
        draw, topics = random.Random(f"{seed}/known"), list(DOMAIN_OF)
        speakers = tuple(SPEAKERS) * each
        return cls(speakers, tuple(conversation_of(draw, name, draw.choices(topics, k=2)) for name in speakers))

    def holding(self, truth: str) -> Bool[np.ndarray, " chats"]:
        """Whether a truth holds of each chat's speaker.

        Raises:
            InputError: no such truth.
        """
        if truth not in TRUTHS:
            raise unknown("truth", truth, TRUTHS)
        shown = [SPEAKERS[name] for name in self.speakers]
        return np.array([not one.good if truth == "bad" else one.manner == truth for one in shown])


def latent_truths(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sae: Any,
    layer: Where,
    known: KnownChats | None = None,
    positions: str = "response",
) -> pd.DataFrame:
    """How well each latent's mean activation tells the chats in which a truth holds from those in which it does not.

    Args:
        known: None draws 40 chats of every speaker.
        positions: `response`: the second answer. `last_prompt`: the token before it, where only the first answer can
            tell the model who speaks.

    Returns:
        A row for each truth and latent: truth, latent, auroc (0.5 is chance), and the latent's means where the truth
        `holds` and where it is `absent`. The best latents of each truth come first.

    Raises:
        InputError: the SAE does not fit the model.
    """
    known = KnownChats.draw() if known is None else known
    groups = conversation_batches(tokenizer, known.chats, 64)
    return truth_table(known, read_latents(model, sae, groups, layer, positions, bf16=False).mean)


def truth_table(
    known: KnownChats, mean: Float[np.ndarray, "chats latents"], truths: Sequence[str] = TRUTHS
) -> pd.DataFrame:
    """`latent_truths` of mean activations that were read before."""
    frames = [_separation(mean, known.holding(truth)).assign(truth=truth) for truth in truths]
    frame = pd.concat(frames, ignore_index=True)[["truth", "latent", "auroc", "holds", "absent"]]
    place = frame["truth"].map({truth: number for number, truth in enumerate(truths)})
    ordered = frame.assign(place=place).sort_values(["place", "auroc"], ascending=[True, False], kind="stable")
    return ordered.drop(columns="place").reset_index(drop=True)


def _separation(mean: Float[np.ndarray, "chats latents"], holds: Bool[np.ndarray, " chats"]) -> pd.DataFrame:
    on, off = mean[holds].mean(axis=0), mean[~holds].mean(axis=0)
    return pd.DataFrame(
        {"latent": range(mean.shape[1]), "auroc": auroc_columns(mean, holds), "holds": on, "absent": off}
    )
