"""All mitigations by name, and how to make one from a configuration."""

from dataclasses import fields
from typing import Any

from persona_probe.errors import InputError, unknown
from persona_probe.finetune.mitigations.corrective import Corrective, NoMitigation
from persona_probe.finetune.mitigations.interleave import Interleave, InterleavePerplexity
from persona_probe.finetune.mitigations.losses import KLToBase, LatentPenalty
from persona_probe.finetune.mitigations.mitigation import Mitigation
from persona_probe.finetune.mitigations.prompts import Inoculation
from persona_probe.finetune.mitigations.pushes import (
    ConceptAblation,
    InferenceAblation,
    InferenceSteering,
    PreventativeSteering,
)
from persona_probe.finetune.mitigations.watched import Alternating, EarlyStop

ALL: tuple[type[Mitigation], ...] = (
    NoMitigation,
    Inoculation,
    Interleave,
    InterleavePerplexity,
    KLToBase,
    ConceptAblation,
    PreventativeSteering,
    LatentPenalty,
    EarlyStop,
    Alternating,
    InferenceAblation,
    InferenceSteering,
    Corrective,
)
MITIGATIONS: dict[str, type[Mitigation]] = {kind.name: kind for kind in ALL}
"""By the name that configurations and tables use."""


def make_mitigation(name: str, strength: float, **settings: Any) -> Mitigation:
    """A mitigation from a configuration's words.

    Raises:
        InputError: an unknown name or setting (near matches are listed), or a strength out of range.
    """
    if name not in MITIGATIONS:
        raise unknown("mitigation", name, MITIGATIONS)
    kind = MITIGATIONS[name]
    known = [f.name for f in fields(kind) if f.name != "strength"]
    for key in settings:
        if key not in known:
            raise unknown(f"setting of {name}", key, known)
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise InputError(f"{name}: strength must be a number, not {strength!r}")
    return kind(strength=float(strength), **settings)
