"""Directions that are not latents, on the same footing: mean difference and logistic probe (and `persona_vector`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from persona_probe.errors import InputError
from persona_probe.locate.logistic import choose_strength, fit_path, held_out_auroc
from persona_probe.locate.rankers import mean_difference
from persona_probe.locate.sweep import Direction, unit_vector
from persona_probe.saes.read import LatentMeans


@dataclass(frozen=True)
class NamedDirection:
    """A direction in the residual stream that has a method's name instead of a latent's number."""

    name: str
    vector: Float[np.ndarray, " d_model"]
    """Points to misaligned; raw units of the residual stream (of log-odds per raw unit, for a probe)."""
    paper: str
    """Whose method it is."""
    held_out: float | None = None
    """AUROC between misaligned and aligned answers to questions that were not used; None where it was not measured."""

    def as_push(self, kind: str) -> Direction:
        """The unit direction for `locate.sweep.Sweep`, which sets the size itself; `kind` groups it in tables.

        Raises:
            InputError: the vector is zero or not finite.
        """
        if not 0 < float(np.linalg.norm(self.vector)) < np.inf:
            raise InputError(f"direction {self.name!r} is zero or not finite: the two sides it compares do not differ")
        return Direction(self.name, kind, unit_vector(self.vector))


def mean_difference_direction(tuned: LatentMeans, control: LatentMeans) -> NamedDirection:
    """`locate.rankers.mean_difference` of two models on the same conversations, as a named direction."""
    paper = "Soligo, Turner et al. 2025, arXiv 2506.11618"
    return NamedDirection("mean difference", mean_difference(tuned, control), paper)


def logistic_probe(
    misaligned_resid: Float[np.ndarray, "misaligned d_model"],
    aligned_resid: Float[np.ndarray, "aligned d_model"],
    clusters: Sequence[str],
    aligned_clusters: Sequence[str] | None = None,
    *,
    folds: int = 5,
    seed: int = 0,
) -> NamedDirection:
    """The weights of a logistic regression between misaligned and aligned answers (Alain & Bengio 2016).

    L2-regularised, on standardised features, mapped back to raw units. The penalty is chosen by cross-validation that
    keeps all answers to a question in one fold. `held_out` is the AUROC on whole held-out questions, with the penalty
    chosen again inside each fold's training questions, so it has not seen them in any way.

    The weights are a filter: where noise is correlated they turn away from it, and need not resemble the mean
    difference (Haufe et al. 2014). They say how to read the persona, not how it is written.

    Args:
        misaligned_resid: mean residual of each misaligned answer (`response_means`, or `LatentMeans.resid`).
        aligned_resid: the same of each aligned answer.
        clusters: the question of each misaligned answer.
        aligned_clusters: the question of each aligned answer; None means the same questions in the same order.
        folds: of whole questions.
        seed: deals the questions to the folds.

    Raises:
        InputError: counts or widths differ, a value is not finite, fewer questions than folds, or training questions
            without both kinds of answers.
    """
    names = [*clusters, *(clusters if aligned_clusters is None else aligned_clusters)]
    x, y = _stack(misaligned_resid, aligned_resid, names, len(clusters))
    held_out = held_out_auroc(x, y, names, folds, seed)
    fit = fit_path(x, y, [choose_strength(x, y, names, folds, seed)])[0]
    return NamedDirection("logistic probe", fit.weights, "Alain & Bengio 2016, arXiv 1610.01644", held_out)


def _stack(
    misaligned: Float[np.ndarray, "misaligned d_model"],
    aligned: Float[np.ndarray, "aligned d_model"],
    names: list[str],
    n_misaligned: int,
) -> tuple[Float[np.ndarray, "n d_model"], Bool[np.ndarray, " n"]]:
    if (len(misaligned), len(aligned)) != (n_misaligned, len(names) - n_misaligned):
        raise InputError(
            f"{len(misaligned)} misaligned and {len(aligned)} aligned answers, but {n_misaligned} and "
            f"{len(names) - n_misaligned} questions: name one for each answer (aligned_clusters where they differ)"
        )
    if misaligned.shape[1:] != aligned.shape[1:]:
        raise InputError(f"widths differ: {misaligned.shape[1:]} and {aligned.shape[1:]}; read both at one layer")
    x = np.concatenate([misaligned, aligned]).astype(np.float64)
    if not np.isfinite(x).all():
        raise InputError("the residuals have values that are not finite: check the model's precision")
    return x, np.arange(len(x)) < n_misaligned
