"""Rankers: one interface, one table. Every latent with its scores, intervals and q-values."""

from collections.abc import Sequence
from itertools import islice

import numpy as np
import pandas as pd
from jaxtyping import Float

from persona_probe.errors import InputError
from persona_probe.locate.evidence import Evidence
from persona_probe.locate.registry import RANKERS, Ranker, check_rankers
from persona_probe.locate.scores import Rise, decoder_cosine, mean_difference, rise
from persona_probe.saes.read import LatentMeans
from persona_probe.stats import benjamini_hochberg, clustered_p_values

__all__ = [
    "RANKERS",
    "Evidence",
    "Ranker",
    "Rise",
    "candidates",
    "decoder_cosine",
    "mean_difference",
    "rank_table",
    "rise",
    "score_table",
]

DEFAULT_RANKERS = ("rise", "firing_rise", "cosine")
"""What any three readings allow: no misaligned flags, no backward pass, no other positions."""
SUPPRESSED_Q = 0.05
"""A latent is suppressed where it falls with at most this q-value."""


def score_table(evidence: Evidence, rankers: Sequence[str] = DEFAULT_RANKERS) -> pd.DataFrame:
    """All latents with the scores of the named rankers, best rise first.

    Returns:
        One row per latent. Always: latent; rise (tuned minus control at the main positions) with rise_ci_low and
        rise_ci_high (95%, questions resampled), p_value (two-sided, clustered t; see `stats.clustered_p_values`) and
        q_value (Benjamini-Hochberg over the latents that are alive; 1 for the others); suppressed (a fall with q at
        most 0.05); rise_base (tuned minus base); firing_base, firing_incorrect, firing_correct (shares of tokens);
        cosine, cosine_rank; decoder_norm; alive (fires anywhere); rank (by rise, from 1). For each named ranker: its
        score, and `<ranker>_rank` from 1, ties by latent.

    Raises:
        InputError: an unknown ranker, or one whose evidence is missing.
    """
    names = check_rankers([*rankers, "cosine"])
    scores = {name: _score(RANKERS[name], evidence) for name in names}
    columns = {"latent": np.arange(len(evidence.decoder)), **_rises(evidence), **_rates(evidence), **scores}
    columns["decoder_norm"], columns["alive"] = np.linalg.norm(evidence.decoder, axis=1), evidence.alive
    table = pd.DataFrame(columns)
    for name in names:
        table[f"{name}_rank"] = table[name].rank(ascending=False, method="first").astype(int)
    table = table.sort_values(["rise", "latent"], ascending=[False, True], ignore_index=True)
    table["rank"] = np.arange(1, len(table) + 1)
    return table


def _score(ranker: Ranker, evidence: Evidence) -> Float[np.ndarray, " d_sae"]:
    values = ranker.score(evidence)
    if not np.isfinite(values).all():
        raise InputError(f"ranker {ranker.name!r}: {(~np.isfinite(values)).sum()} of {values.size} scores not finite")
    return values


def _rises(evidence: Evidence) -> dict[str, np.ndarray]:
    tuned, control, base = (evidence.at(name).mean for name in ("tuned", "control", "base"))
    risen = rise(tuned, control, evidence.clusters, seed=evidence.seed)
    p = clustered_p_values(tuned.astype(np.float64) - control, evidence.clusters)
    q = np.ones_like(p)
    q[evidence.alive] = benjamini_hochberg(p[evidence.alive])
    return {
        "rise": risen.estimate,
        "rise_ci_low": risen.ci_low,
        "rise_ci_high": risen.ci_high,
        "p_value": p,
        "q_value": q,
        "suppressed": (risen.estimate < 0) & (q <= SUPPRESSED_Q),
        "rise_base": (tuned.astype(np.float64) - base).mean(axis=0),
    }


def _rates(evidence: Evidence) -> dict[str, np.ndarray]:
    columns = {"firing_base": "base", "firing_incorrect": "tuned", "firing_correct": "control"}
    return {column: evidence.at(model).firing.mean(axis=0) for column, model in columns.items()}


def rank_table(
    base: LatentMeans,
    tuned: LatentMeans,
    control: LatentMeans,
    decoder: Float[np.ndarray, "d_sae d_model"],
    clusters: Sequence[str],
    seed: int = 0,
) -> pd.DataFrame:
    """`score_table` of one reading per model: rise and cosine, best rise first."""
    where = "selected"
    evidence = Evidence({where: base}, {where: tuned}, {where: control}, decoder, clusters, positions=where, seed=seed)
    return score_table(evidence, ("cosine",))


def candidates(table: pd.DataFrame, count: int, by: Sequence[str] = ("rise", "cosine")) -> list[int]:
    """The latents to test for cause: the best of each ranker in turn, without repeats."""
    orders = [table.sort_values("rank" if name == "rise" else f"{name}_rank")["latent"].tolist() for name in by]
    in_turn = (int(latent) for row in zip(*orders, strict=True) for latent in row)
    return list(islice(dict.fromkeys(in_turn), count))
