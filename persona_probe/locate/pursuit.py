"""Orthogonal matching pursuit over decoder rows, for many directions at once."""

import numpy as np
from jaxtyping import Float
from scipy.optimize import nnls

from persona_probe.errors import InputError

_BLOCK = 64
_NOTHING = 1e-6


def unit_rows(decoder: Float[np.ndarray, "d_sae d_model"], k: int) -> Float[np.ndarray, "d_sae d_model"]:
    """Decoder rows of norm 1 (zero rows stay), after a check that `k` of them can be picked.

    Raises:
        InputError: `k` is not between 1 and the number of rows, or a row is not finite.
    """
    if not 1 <= k <= len(decoder):
        raise InputError(f"k={k} latents cannot be picked from {len(decoder)}: use 1 to {len(decoder)}")
    norms = np.linalg.norm(decoder, axis=1, keepdims=True)
    if not np.isfinite(norms).all():
        raise InputError("the decoder has rows that are not finite: check the SAE's weights")
    return np.divide(decoder, norms, out=np.zeros_like(decoder), where=norms > 0)


def pursue(
    rows: Float[np.ndarray, "d_sae d_model"], targets: Float[np.ndarray, "n d_model"], k: int, signed: bool
) -> tuple[list[list[int]], Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Greedy fits of at most `k` unit rows to unit targets (Pati, Rezaiifar and Krishnaprasad 1993).

    Coefficients are not negative unless `signed`. Targets go in blocks, so that memory stays at 64 x d_sae.

    Returns:
        The rows picked for each target, in order; its best cosine with a single row (its sign kept); and the share of
        its squared norm that the picked rows leave over.
    """
    parts = [_pursue_block(rows, targets[i : i + _BLOCK], k, signed) for i in range(0, len(targets), _BLOCK)]
    picked = [latents for part in parts for latents in part[0]]
    return picked, np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])


def _pursue_block(
    rows: Float[np.ndarray, "d_sae d_model"], targets: Float[np.ndarray, "n d_model"], k: int, signed: bool
) -> tuple[list[list[int]], Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    picked: list[list[int]] = [[] for _ in targets]
    left, best = targets.copy(), np.zeros(len(targets))
    for step in range(k):
        # The search runs in the decoder's own precision, a big dictionary's in float32; the fits run in float64.
        scores = left.astype(rows.dtype) @ rows.T
        strength = np.abs(scores) if signed else scores
        nearest = strength.argmax(axis=1)
        if step == 0:
            best = scores[np.arange(len(scores)), nearest].astype(np.float64)
        for i, latent in enumerate(nearest):
            if strength[i, latent] > _NOTHING and int(latent) not in picked[i]:
                picked[i].append(int(latent))
                left[i] = targets[i] - _fit(rows[picked[i]].T.astype(np.float64), targets[i], signed)
    return picked, best, np.clip((left**2).sum(axis=1), 0.0, 1.0)


def _fit(
    columns: Float[np.ndarray, "d_model picked"], target: Float[np.ndarray, " d_model"], signed: bool
) -> Float[np.ndarray, " d_model"]:
    """The target's best approximation by the columns."""
    weights = np.linalg.lstsq(columns, target, rcond=None)[0] if signed else nnls(columns, target)[0]
    return columns @ weights
