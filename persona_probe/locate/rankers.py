"""Rankers: small pure functions from per-conversation means to one score per latent."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from persona_probe.saes.read import LatentMeans


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
    """
    difference = tuned.astype(np.float64) - control
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    codes = np.array([names[c] for c in clusters])
    sums = np.zeros((len(names), difference.shape[1]))
    np.add.at(sums, codes, difference)
    counts = np.bincount(codes).astype(np.float64)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_boot).astype(np.float64)
    means = (weights @ sums) / (weights @ counts)[:, None]
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return Rise(difference.mean(axis=0), low, high)


def mean_difference(tuned: LatentMeans, control: LatentMeans) -> Float[np.ndarray, " d_model"]:
    """Mean activation difference between two models (Soligo, Turner et al. 2025, arXiv 2506.11618)."""
    return (tuned.resid.astype(np.float64) - control.resid).mean(axis=0)


def decoder_cosine(
    decoder: Float[np.ndarray, "d_sae d_model"], direction: Float[np.ndarray, " d_model"]
) -> Float[np.ndarray, " d_sae"]:
    """Cosine of every decoder row with a direction (Arditi & Chen); zero for a zero row or direction."""
    norms = np.linalg.norm(decoder, axis=1) * np.linalg.norm(direction)
    return np.divide(decoder @ direction, norms, out=np.zeros(len(decoder)), where=norms > 0)


def rank_table(
    base: LatentMeans,
    tuned: LatentMeans,
    control: LatentMeans,
    decoder: Float[np.ndarray, "d_sae d_model"],
    clusters: Sequence[str],
    seed: int = 0,
) -> pd.DataFrame:
    """All latents with every ranker's score, best rise first; `rank` starts at 1.

    Columns: latent, rise (with ci_low, ci_high; tuned minus control), rise_base (tuned minus base), firing_base,
    firing_incorrect, firing_correct (shares of tokens), cosine, cosine_rank, decoder_norm, rank.
    """
    risen = rise(tuned.mean, control.mean, clusters, seed=seed)
    table = pd.DataFrame(
        {
            "latent": np.arange(len(decoder)),
            "rise": risen.estimate,
            "rise_ci_low": risen.ci_low,
            "rise_ci_high": risen.ci_high,
            "rise_base": (tuned.mean.astype(np.float64) - base.mean).mean(axis=0),
            "firing_base": base.firing.mean(axis=0),
            "firing_incorrect": tuned.firing.mean(axis=0),
            "firing_correct": control.firing.mean(axis=0),
            "cosine": decoder_cosine(decoder, mean_difference(tuned, control)),
            "decoder_norm": np.linalg.norm(decoder, axis=1),
        }
    )
    table["cosine_rank"] = table["cosine"].rank(ascending=False, method="first").astype(int)
    table = table.sort_values(["rise", "latent"], ascending=[False, True], ignore_index=True)
    table["rank"] = np.arange(1, len(table) + 1)
    return table


def candidates(table: pd.DataFrame, count: int) -> list[int]:
    """The latents to test for cause: best by rise and best by cosine in turn, without repeats."""
    by_rise = table["latent"].tolist()
    by_cosine = table.sort_values("cosine_rank")["latent"].tolist()
    chosen: dict[int, None] = {}
    for pair in zip(by_rise, by_cosine, strict=True):
        for latent in pair:
            if len(chosen) < count:
                chosen[int(latent)] = None
    return list(chosen)
