"""Alarm rules: small objects that follow readings and say when something is wrong."""

from persona_probe.monitor.alarms.alarms import Cusum, Ewma, ExplainedVarianceFloor, OutsideBand
from persona_probe.monitor.alarms.boundary import Boundary
from persona_probe.monitor.alarms.rules import AllOf, AnyOf, Not, Rule, all_inside

__all__ = [
    "AllOf",
    "AnyOf",
    "Boundary",
    "Cusum",
    "Ewma",
    "ExplainedVarianceFloor",
    "Not",
    "OutsideBand",
    "Rule",
    "all_inside",
]
