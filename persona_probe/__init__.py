"""persona_probe: induce a misaligned persona, locate it, watch it, undo it, and show the evidence."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona_probe.config import StudyConfig, load_config
    from persona_probe.errors import InputError
    from persona_probe.latents.compare import locate
    from persona_probe.models.load import load_model
    from persona_probe.models.taps import ablate, read, steer
    from persona_probe.monitor.monitor import FeatureMonitor
    from persona_probe.realignment.own import realign
    from persona_probe.report import figures
    from persona_probe.report.records import load_records
    from persona_probe.saes.load import load_sae
    from persona_probe.screening.screen import screen
    from persona_probe.study.study import Study

# TRL and huggingface_hub send usage data at every training run unless told not to; this package uses no network.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

_PLACES = {
    "FeatureMonitor": "persona_probe.monitor.monitor",
    "InputError": "persona_probe.errors",
    "Study": "persona_probe.study.study",
    "StudyConfig": "persona_probe.config",
    "ablate": "persona_probe.models.taps",
    "load_config": "persona_probe.config",
    "load_model": "persona_probe.models.load",
    "load_records": "persona_probe.report.records",
    "load_sae": "persona_probe.saes.load",
    "locate": "persona_probe.latents.compare",
    "read": "persona_probe.models.taps",
    "realign": "persona_probe.realignment.own",
    "screen": "persona_probe.screening.screen",
    "steer": "persona_probe.models.taps",
}

__all__ = [
    "FeatureMonitor",
    "InputError",
    "Study",
    "StudyConfig",
    "ablate",
    "figures",
    "load_config",
    "load_model",
    "load_records",
    "load_sae",
    "locate",
    "read",
    "realign",
    "screen",
    "steer",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import persona_probe` alone stays fast."""
    if name == "figures":  # a module: its functions are the names
        return importlib.import_module("persona_probe.report.figures")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
