"""Mitigations: ways to fine-tune on narrow data without waking the persona, behind one interface."""

from persona_probe.finetune.mitigations.ground import Ground, MitigatedFit, MitigatedRun
from persona_probe.finetune.mitigations.mitigation import Mitigation
from persona_probe.finetune.mitigations.registry import MITIGATIONS, make_mitigation
from persona_probe.finetune.mitigations.train import train_mitigated

__all__ = [
    "MITIGATIONS",
    "Ground",
    "MitigatedFit",
    "MitigatedRun",
    "Mitigation",
    "make_mitigation",
    "train_mitigated",
]
