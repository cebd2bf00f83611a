"""The predicted shift of the contrast index, or why there is none."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from persona_probe.evaluate.shift import ScoredRun, ShiftLine, calibrate
from persona_probe.models.identity import weights_hash
from persona_probe.screening.feature import ScreenFeature
from persona_probe.screening.reading import ScreenSettings

PREDICTOR = "projection_difference"
"""The ranker whose mean over a set predicts the shift."""


@dataclass(frozen=True)
class Shift:
    """A predicted shift of the contrast index (nats per token), or why there is none."""

    score: float
    """The set's mean score."""
    estimate: float | None
    low: float | None
    high: float | None
    """Ends of the 95% prediction interval for a new data set's mean over seeds."""
    statement: str


def predict_shift(calibration: ShiftLine | None, score: float) -> Shift:
    """The expected shift of the contrast index from training on a set with this mean score.

    Without a calibration, and outside its scores, there is no number; the statement says why.
    """
    if calibration is None:
        why = "no prediction: no calibration for this model and feature (at least five trained data sets are needed)"
        return Shift(score, None, None, None, why)
    low, high = float(calibration.scores.min()), float(calibration.scores.max())
    if not np.isfinite(score) or not low <= score <= high:
        why = f"no prediction: mean score {score:.3g} lies outside the calibrated range {low:.3g} to {high:.3g}"
        return Shift(score, None, None, None, why)
    estimate, bottom, top = calibration.interval(score)
    text = f"predicted shift {estimate:+.2f} nats per token, 95% prediction interval {bottom:+.2f} to {top:+.2f}"
    return Shift(score, estimate, bottom, top, f"{text}, for training as in the calibration: {calibration.statement}")


def predict_for(calibration: ShiftLine | None, scores: Mapping[str, Float[np.ndarray, " rows"]]) -> Shift:
    """`predict_shift` of a screened set; without the predicting ranker, the statement says so."""
    if PREDICTOR not in scores:
        return Shift(float("nan"), None, None, None, f"no prediction: it needs the ranker {PREDICTOR}")
    known = scores[PREDICTOR][np.isfinite(scores[PREDICTOR])]
    return predict_shift(calibration, float(known.mean()) if known.size else float("nan"))


# --- The packaged calibration, and what it is valid for

FILE = "screening_calibration.json"


def valid_for(feature: ScreenFeature, model: nn.Module, settings: ScreenSettings) -> dict[str, Any]:
    """What a calibration depends on, as JSON values. Scores of another feature or model are not comparable."""
    return {
        "feature": feature.digest,
        "weights": weights_hash(model),
        "own_tokens": settings.own_tokens,
        "max_tokens": settings.max_tokens,
    }


def packaged_calibration(
    feature: ScreenFeature, model: nn.Module, settings: ScreenSettings, ranker: str = PREDICTOR
) -> ShiftLine | None:
    """The packaged calibration; None if it was made for another model, feature or length of own answers."""
    file = resources.files("persona_probe.data") / FILE
    if not file.is_file():
        return None
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if stored["valid_for"] != valid_for(feature, model, settings):
        return None
    source = stored["provenance"]
    return calibrate(pairs_of(stored, ranker), f"{source['study']}, {source['training']}")


def pairs_of(table: Mapping[str, Any], ranker: str = PREDICTOR) -> list[ScoredRun]:
    """The pairs of a calibration file, with one ranker's means as their scores."""
    return [ScoredRun(p["data"], p["seed"], p["score"][ranker], p["shift"]) for p in table["pairs"]]
