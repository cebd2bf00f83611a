"""Does any latent carry a direction? Decoder rows are fitted to it, and random directions show how well luck fits."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import nnls

from persona_probe.errors import InputError

# --- Orthogonal matching pursuit over decoder rows, for many directions at once

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
        its squared norm that the picked rows do not explain.
    """
    parts = [_pursue_block(rows, targets[i : i + _BLOCK], k, signed) for i in range(0, len(targets), _BLOCK)]
    choices = [latents for part in parts for latents in part[0]]
    return choices, np.concatenate([part[1] for part in parts]), np.concatenate([part[2] for part in parts])


def _pursue_block(
    rows: Float[np.ndarray, "d_sae d_model"], targets: Float[np.ndarray, "n d_model"], k: int, signed: bool
) -> tuple[list[list[int]], Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    choices: list[list[int]] = [[] for _ in targets]
    left, best = targets.copy(), np.zeros(len(targets))
    for step in range(k):
        # The search runs in the decoder's precision (float32 for a big dictionary), the fits in float64.
        scores = left.astype(rows.dtype) @ rows.T
        strength = np.abs(scores) if signed else scores
        nearest = strength.argmax(axis=1)
        if step == 0:
            best = scores[np.arange(len(scores)), nearest].astype(np.float64)
        for i, latent in enumerate(nearest):
            if strength[i, latent] > _NOTHING and int(latent) not in choices[i]:
                choices[i].append(int(latent))
                left[i] = targets[i] - _fit(rows[choices[i]].T.astype(np.float64), targets[i], signed)
    return choices, best, np.clip((left**2).sum(axis=1), 0.0, 1.0)


def _fit(
    columns: Float[np.ndarray, "d_model picked"], target: Float[np.ndarray, " d_model"], signed: bool
) -> Float[np.ndarray, " d_model"]:
    """The target's best approximation by the columns."""
    weights = np.linalg.lstsq(columns, target, rcond=None)[0] if signed else nnls(columns, target)[0]
    return columns @ weights


# --- The verdict, against random directions of the same dictionary

MARGIN = 0.15
"""A fit must lie this far beyond the 99th percentile of random directions, in cosine and in share explained."""
NULL_MARGIN = 0.2
"""The same beyond what seed noise of the null pair's size gives, of which there is only one measurement."""
NULL_SIZE = 2.0
"""Another run's seed noise may have this many times the norm of the null pair's mean difference."""
_STREAM = 4608


@dataclass(frozen=True)
class Spread:
    """One number over random directions."""

    median: float
    ci_low: float
    """2.5th percentile."""
    ci_high: float
    """97.5th percentile."""
    extreme: float
    """The 99th percentile, which one random direction in a hundred exceeds (the first, if small is strong)."""


@dataclass(frozen=True)
class Reference:
    """How well a dictionary fits random directions; compute it once for many directions."""

    cosine: Spread
    """Best cosine with a single decoder row."""
    unexplained: Spread
    """Share of the squared norm that `k` rows do not explain."""
    k: int
    signed: bool
    n: int
    """How many random directions were drawn."""


@dataclass(frozen=True)
class Carriers:
    """The latents nearest to a direction, and whether they are nearer than luck explains.

    A dictionary with many more rows than dimensions has some row near any direction: with 4,608 rows in 576 dimensions
    the best cosine is about 0.15. So a direction counts as carried only where its best cosine is more than `margin`
    above the 99th percentile of random directions, or where the share of its squared norm that `k` latents explain is.
    Isotropic directions are the mild reference, hence the margin: Gaussian mixtures of all decoder rows, which lie
    where the dictionary is dense, come nearer. On the shipped SAE (k 8) one in a hundred of these reaches a cosine of
    0.27 and leaves 72% over; of isotropic ones 0.19 and 84%. A direction with much of the rows' common mean can still
    pass: look at `best_cosine` and `unexplained`, not at the verdict alone.
    """

    latents: tuple[int, ...]
    """Picked decoder rows, in order; fewer than `k` if no other row helps."""
    cosines: tuple[float, ...]
    """Cosine of each picked row with the direction."""
    best_cosine: float
    """The largest cosine with one row (with its sign, if `signed`)."""
    unexplained: float
    """Share of the direction's squared norm that the picked rows do not explain (0 to 1)."""
    reference: Reference
    margin: float
    null_cosine: float | None = None
    """The best cosine of the null pair's mean difference with one row, in either sign, times the share of the
    direction's norm that seed noise may be (`NULL_SIZE` times the null's norm, at most 1); None without a null pair."""
    null_unexplained: float | None = None
    """What `k` rows would leave if they explained seed noise of that size as they explain the null, and no more."""

    @property
    def one_latent(self) -> bool:
        """Whether a single latent carries the direction."""
        best = abs(self.best_cosine) if self.reference.signed else self.best_cosine
        beyond = self.null_cosine is None or best > self.null_cosine + NULL_MARGIN
        return beyond and best > self.reference.cosine.extreme + self.margin

    @property
    def few_latents(self) -> bool:
        """Whether `k` latents together carry it."""
        beyond = self.null_unexplained is None or self.unexplained < self.null_unexplained - NULL_MARGIN
        return beyond and self.unexplained < self.reference.unexplained.extreme - self.margin

    @property
    def carried(self) -> bool:
        """Whether one or few latents carry it."""
        return self.one_latent or self.few_latents

    def __str__(self) -> str:
        luck, verdict = self.reference, "no latent carries this"
        if self.one_latent:
            verdict = f"latent {self.latents[0]} carries {self.best_cosine**2:.0%} of this"
        elif self.few_latents:
            verdict = f"{len(self.latents)} latents carry {1 - self.unexplained:.0%} of this"
        nulls = ("", "")
        if self.null_cosine is not None and self.null_unexplained is not None:
            nulls = (f"; seed noise {self.null_cosine:.2f}", f"; seed noise {self.null_unexplained:.0%}")
            if not self.carried:
                verdict = "no latent carries this beyond seed noise"
        return (
            f"{verdict}: best cosine {self.best_cosine:.2f} (random directions {luck.cosine.ci_low:.2f} to "
            f"{luck.cosine.ci_high:.2f}{nulls[0]}), unexplained by {luck.k} latents {self.unexplained:.0%} (random "
            f"directions {luck.unexplained.ci_low:.0%} to {luck.unexplained.ci_high:.0%}{nulls[1]})"
        )


def carriers(
    decoder: Float[np.ndarray, "d_sae d_model"],
    direction: Float[np.ndarray, " d_model"],
    k: int = 8,
    *,
    signed: bool = False,
    margin: float = MARGIN,
    reference: Reference | None = None,
    null: Float[np.ndarray, " d_model"] | None = None,
    n_random: int = 500,
    seed: int = 0,
) -> Carriers:
    """Fit decoder rows to a direction, and judge the fit against random directions of the same dictionary.

    The mean difference of two organisms of the same data lies much nearer to some row than isotropic directions do. So
    a mean difference is judged against a null pair's as well: a row must be nearer (by `NULL_MARGIN`) than seed noise
    of the null's size would bring it.

    The fit (`pursue`) is greedy, so the best `k` rows may explain a little more than these. Coefficients are not
    negative, because an active latent only adds its row. `Carriers` states the rule of the verdict.

    Args:
        decoder: decoder rows, of any norm; zero rows are never picked.
        direction: of any norm.
        k: how many rows may be picked.
        signed: allow negative coefficients, for a difference between models in which latents fall as well as rise.
        margin: how far beyond the reference counts, in cosine and in share of the squared norm.
        reference: from `random_reference`, to share it between directions; None computes it (`n_random`, `seed`).
        null: mean difference of a null pair, the control arm trained with two seeds.

    Raises:
        InputError: widths differ, the direction is zero or not finite, `k` is not between 1 and the number of rows,
            or the reference was made with another `k` or `signed`.
    """
    if direction.shape != decoder.shape[1:]:
        raise InputError(f"the direction has shape {direction.shape}, the decoder rows {decoder.shape[1:]}")
    norm = float(np.linalg.norm(direction))
    if not 0 < norm < np.inf:
        raise InputError("the direction is zero or not finite: no latent can carry it")
    known = reference or random_reference(decoder, k, signed=signed, n_random=n_random, seed=seed)
    if (known.k, known.signed) != (k, signed):
        raise InputError(f"the reference has k={known.k}, signed={known.signed}: make one with k={k}, signed={signed}")
    rows = unit_rows(decoder, k)
    target = direction.astype(np.float64) / norm
    choices, best, left = pursue(rows, target[None], k, signed)
    cosines = tuple(float(rows[latent] @ target) for latent in choices[0])
    found = (tuple(choices[0]), cosines, float(best[0]), float(left[0]), known, margin)
    if null is None or not null.any():
        return Carriers(*found)
    size = float(np.linalg.norm(null))
    other, share = null.astype(np.float64) / size, min(1.0, NULL_SIZE * size / norm)
    # The null pair's sign is arbitrary.
    _, null_best, null_left = pursue(rows, np.stack([other, -other]), k, signed)
    null_explained = share**2 * (1 - float(null_left.min()))
    return Carriers(*found, share * float(np.abs(null_best).max()), 1 - null_explained)


def random_reference(
    decoder: Float[np.ndarray, "d_sae d_model"], k: int = 8, *, signed: bool = False, n_random: int = 500, seed: int = 0
) -> Reference:
    """The fit of `carriers` for isotropic random directions.

    Raises:
        InputError: fewer than 100 random directions (a 99th percentile needs them), or `k` out of range.
    """
    if n_random < 100:
        raise InputError(f"n_random={n_random} is too few for a 99th percentile: use at least 100")
    rows = unit_rows(decoder, k)
    # A separate stream: a decoder drawn at random from the same seed must not hold these directions.
    noise = np.random.default_rng((seed, _STREAM)).normal(size=(n_random, decoder.shape[1]))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    _, best, left = pursue(rows, noise, k, signed)
    return Reference(_spread(np.abs(best) if signed else best, 0.99), _spread(left, 0.01), k, signed, n_random)


def _spread(values: Float[np.ndarray, " n"], extreme: float) -> Spread:
    return Spread(*(float(q) for q in np.quantile(values, [0.5, 0.025, 0.975, extreme])))
