"""A crosscoder of two models: one dictionary whose latents have a decoder row in each, and how they are ranked.

Lindsey et al. 2024 (transformer-circuits.pub/2024/crosscoders); with BatchTopK after Minder et al. 2025 (arXiv
2504.02922). Two models side by side are one wide input: a BatchTopK SAE on the concatenated streams is a crosscoder
whose sparsity counts both rows together.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_probe.latents.difference import (
    DictionaryRecipe,
    FoundDirections,
    check_together,
    surely_active,
    train_batch_topk,
)

RECIPE = DictionaryRecipe(d_sae=128, k=12, steps=400)
RANKINGS = ("size", "relative norm")
"""`size`: by how much of the difference a latent surely carries. `relative norm`: by the tuned model's share of the two
rows' norms, as the literature ranks; a latent of the tuned model alone has 1."""
FIRES = 0.01
"""Least share of tokens on which a latent fires to be ranked by its norms."""


def crosscoder(
    tuned: Float[Tensor, "tokens d_model"],
    other: Float[Tensor, "tokens d_model"],
    conversation: Int[Tensor, " tokens"],
    recipe: DictionaryRecipe | None = None,
) -> dict[str, FoundDirections]:
    """Train a crosscoder of two models and rank its latents; a latent's direction is its tuned row minus the other.

    Both streams are centred on the other's mean and the decoder has no bias, so that a shift that all tokens have
    must lie in a latent.

    Returns:
        The directions by each of `RANKINGS`.

    Raises:
        InputError: as `difference_dictionary`.
    """
    check_together(tuned, other, conversation)
    centre = other.float().mean(dim=0)
    both = torch.cat([other.float() - centre, tuned.float() - centre], dim=1)
    found = train_batch_topk(both, recipe or RECIPE)
    width = other.shape[1]
    before, after = (part.double().numpy() for part in (found.rows[:, :width], found.rows[:, width:]))
    rows, active = after - before, surely_active(found.acts, conversation)
    norms = [np.linalg.norm(part, axis=1) for part in (before, after)]
    share = norms[1] / np.maximum(norms[0] + norms[1], 1e-12)
    fires = (found.acts > 0).float().mean(dim=0).numpy() >= FIRES
    return {
        "size": FoundDirections.ranked(rows, active * np.linalg.norm(rows, axis=1)),
        "relative norm": FoundDirections.ranked(rows, np.where(fires, share, -np.inf)),
    }
