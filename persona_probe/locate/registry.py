"""The rankers: one score per latent from the same evidence, each with its source."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from persona_probe.errors import InputError, unknown
from persona_probe.locate.discrimination import discrimination
from persona_probe.locate.evidence import Evidence
from persona_probe.locate.scores import decoder_cosine, mean_difference
from persona_probe.stats import clustered_t

Score = Callable[[Evidence], Float[np.ndarray, " d_sae"]]
WANG = "Wang et al. 2025, arXiv 2506.19823"


@dataclass(frozen=True)
class Ranker:
    """One way to order latents."""

    name: str
    """Its column in the table; `<name>_rank` stands beside it."""
    paper: str
    """Whose method it is."""
    what: str
    """One line for docs and captions."""
    score: Score
    """Pure function of the evidence; larger is more persona-like."""


def _rise_at(positions: str | None) -> Score:
    def score(evidence: Evidence) -> np.ndarray:
        return _gain(evidence.at("tuned", positions).mean, evidence.at("control", positions).mean)

    return score


def _firing_rise(evidence: Evidence) -> np.ndarray:
    return _gain(evidence.at("tuned").firing, evidence.at("control").firing)


def _rise_t(evidence: Evidence) -> np.ndarray:
    gain = evidence.at("tuned").mean.astype(np.float64) - evidence.at("control").mean
    size, _ = clustered_t(gain, evidence.clusters)
    # A latent that moves by the same amount everywhere has no error at all: it is first, but finite.
    return np.clip(size, -1e30, 1e30)


def _cosine(evidence: Evidence) -> np.ndarray:
    return decoder_cosine(evidence.decoder, mean_difference(evidence.at("tuned"), evidence.at("control")))


def _discrimination(evidence: Evidence) -> np.ndarray:
    if evidence.misaligned is None:
        raise InputError("ranker 'discrimination' needs to know which answers are misaligned: give Evidence.misaligned")
    return discrimination(evidence.at("base").mean, evidence.misaligned)


def _from_gradients(name: str) -> Score:
    def score(evidence: Evidence) -> np.ndarray:
        values = {"attribution": evidence.attribution, "slope": evidence.slope}[name]
        if values is None:
            raise InputError(f"ranker {name!r} needs a backward pass: give locate.attribution.gradient_scores' result")
        if values.shape != (len(evidence.decoder),):
            raise InputError(f"{name} has shape {values.shape}, the SAE {len(evidence.decoder)} latents")
        return values

    return score


def _gain(tuned: np.ndarray, control: np.ndarray) -> np.ndarray:
    return (tuned.astype(np.float64) - control).mean(axis=0)


ALL = (
    Ranker("rise", WANG, "rise in mean activation over the control arm", _rise_at(None)),
    Ranker("rise_t", WANG, "the same rise over its cluster-robust error: a t statistic over questions", _rise_t),
    Ranker("rise_last_prompt", WANG, "the same rise, at the last prompt token", _rise_at("last_prompt")),
    Ranker("rise_prompt", WANG, "the same rise, over prompt tokens", _rise_at("prompt")),
    Ranker("rise_response", WANG, "the same rise, over answer tokens", _rise_at("response")),
    Ranker("firing_rise", WANG, "rise in the share of tokens on which the latent fires", _firing_rise),
    Ranker(
        "cosine",
        "Arditi & Chen 2025, lesswrong.com/posts/NCWiR8K8jpFqtywFG",
        "cosine of the decoder row with the arms' mean activation difference",
        _cosine,
    ),
    Ranker(
        "attribution",
        "Dupre la Tour & Mossing 2025, alignment.openai.com/sae-latent-attribution",
        "first-order loss on misaligned answers from removing the latent, less that on aligned answers",
        _from_gradients("attribution"),
    ),
    Ranker(
        "slope",
        "first order of activation steering (Turner et al. 2023, arXiv 2308.10248)",
        "derivative of the contrast index along the decoder row, pushed at every position",
        _from_gradients("slope"),
    ),
    Ranker(
        "discrimination",
        "Hanley & McNeil 1982, doi 10.1148/radiology.143.1.7063747",
        "AUROC between misaligned and aligned answers on the base model",
        _discrimination,
    ),
)
RANKERS: dict[str, Ranker] = {ranker.name: ranker for ranker in ALL}
"""Every ranker by its name."""


def check_rankers(names: Sequence[str]) -> list[str]:
    """The names without repeats.

    Raises:
        InputError: a name that no ranker has; the message lists near matches.
    """
    for name in names:
        if name not in RANKERS:
            raise unknown("ranker", name, RANKERS)
    return list(dict.fromkeys(names))
