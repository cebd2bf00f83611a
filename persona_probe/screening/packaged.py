"""The calibration that comes with the package, and what it is valid for."""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from torch import nn

from persona_probe.evaluate.generation.identity import weights_hash
from persona_probe.screening.calibrate import Calibration, Pair, calibrate
from persona_probe.screening.feature import ScreenFeature
from persona_probe.screening.prediction import RANKER
from persona_probe.screening.settings import Settings

FILE = "screening_calibration.json"


def valid_for(feature: ScreenFeature, model: nn.Module, settings: Settings) -> dict[str, Any]:
    """What a calibration depends on, as JSON values: scores of another feature or model are other numbers."""
    return {
        "feature": feature.digest,
        "weights": weights_hash(model),
        "own_tokens": settings.own_tokens,
        "max_tokens": settings.max_tokens,
    }


def packaged_calibration(
    feature: ScreenFeature, model: nn.Module, settings: Settings, ranker: str = RANKER
) -> Calibration | None:
    """The calibration that comes with the package, where model, feature and own answers are those that it is for."""
    file = resources.files("persona_probe.data") / FILE
    if not file.is_file():
        return None
    held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if held["valid_for"] != valid_for(feature, model, settings):
        return None
    source = held["provenance"]
    return calibrate(pairs_of(held, ranker), f"{source['study']}, {source['training']}")


def pairs_of(held: Mapping[str, Any], ranker: str = RANKER) -> list[Pair]:
    """The pairs of a calibration file, with one ranker's means as the scores."""
    return [Pair(p["data"], p["seed"], p["score"][ranker], p["shift"]) for p in held["pairs"]]
