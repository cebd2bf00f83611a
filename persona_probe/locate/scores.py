"""What rankers compute: rise, mean difference, decoder cosine."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from persona_probe.saes.read import LatentMeans
from persona_probe.stats import bootstrap_columns


@dataclass(frozen=True)
class Rise:
    """Rise of every latent between two models on the same conversations, with a clustered bootstrap interval."""

    estimate: Float[np.ndarray, " d_sae"]
    ci_low: Float[np.ndarray, " d_sae"]
    ci_high: Float[np.ndarray, " d_sae"]


def rise(
    tuned: Float[np.ndarray, "conversations d_sae"],
    control: Float[np.ndarray, "conversations d_sae"],
    clusters: Sequence[str],
    n_boot: int = 1000,
    seed: int = 0,
) -> Rise:
    """Control-corrected rise in mean activation: paired difference, resampling whole questions.

    Wang et al. 2025 (arXiv 2506.19823, section 3) rank by the rise over the base model; here the control arm takes
    the base's place, so that what any fine-tuning does cancels.

    Raises:
        InputError: no conversations, or `clusters` of another length.
    """
    difference = tuned.astype(np.float64) - control
    low, high = bootstrap_columns(difference, clusters, n_boot, seed)
    return Rise(difference.mean(axis=0), low, high)


def mean_difference(tuned: LatentMeans, control: LatentMeans) -> Float[np.ndarray, " d_model"]:
    """Mean activation difference between two models (Soligo, Turner et al. 2025, arXiv 2506.11618)."""
    return (tuned.resid.astype(np.float64) - control.resid).mean(axis=0)


def decoder_cosine(
    decoder: Float[np.ndarray, "d_sae d_model"], direction: Float[np.ndarray, " d_model"]
) -> Float[np.ndarray, " d_sae"]:
    """Cosine of every decoder row with a direction (Arditi & Chen 2025); zero for a zero row or direction."""
    norms = np.linalg.norm(decoder, axis=1) * np.linalg.norm(direction)
    return np.divide(decoder @ direction, norms, out=np.zeros(len(decoder)), where=norms > 0)
