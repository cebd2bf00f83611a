"""Readings made by hand, for tests of alarms and actions."""

import math
from collections.abc import Sequence

from persona_probe.monitor.events import FeatureValue, Reading, Start
from persona_probe.monitor.rules.rule import Rule

NAN = math.nan


def feature(shift: float, name: str = "persona", base_mean: float = 1.0, base_sd: float = 2.0) -> FeatureValue:
    """A feature that lies `shift` base standard deviations from its base."""
    mean = base_mean + shift * base_sd
    return FeatureValue(name, 3, mean, mean - 0.1, mean + 0.1, mean + 5, 0.5, base_mean, base_sd)


def reading(
    step: int, *values: float | FeatureValue, mode: str = "probe", ev: float = 0.9, n_probes: int = 8
) -> Reading:
    """A reading of `persona` at these shifts, or of these features."""
    features = tuple(v if isinstance(v, FeatureValue) else feature(v) for v in values)
    return Reading(step, mode, features, ev, 8.0, 10.0, n_probes, 0.1)


def start(*names: str, **bands: tuple[float, float]) -> Start:
    """The start of a run that reads these features."""
    return Start({name: 3 for name in names or ("persona",)}, 1, 8, bands)


def alarm_steps(rule: Rule, shifts: Sequence[float]) -> list[int]:
    """Steps (from 0) at which a rule fires on a series of `persona`."""
    return [step for step, shift in enumerate(shifts) if rule.update(reading(step, shift)) is not None]
