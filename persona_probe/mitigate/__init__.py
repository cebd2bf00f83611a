"""Mitigations: ways to fine-tune on narrow data without waking the persona, behind one interface."""

from persona_probe.mitigate.methods import MITIGATIONS, make_mitigation
from persona_probe.mitigate.mitigation import Ground, MitigatedFit, MitigatedRun, Mitigation
from persona_probe.mitigate.train import train_mitigated

__all__ = [
    "MITIGATIONS",
    "Ground",
    "MitigatedFit",
    "MitigatedRun",
    "Mitigation",
    "make_mitigation",
    "train_mitigated",
]
