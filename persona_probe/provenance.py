"""Where a run's numbers come from: the manifest as it starts, with versions and revision."""

import contextlib
import importlib.metadata
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from persona_probe.config import StudyConfig

PACKAGES = (
    "persona-probe",
    "torch",
    "transformers",
    "transformer-lens",
    "sae-lens",
    "trl",
    "peft",
    "datasets",
    "numpy",
    "pandas",
    "plotly",
)


def first_manifest(config: StudyConfig) -> dict[str, Any]:
    """What a manifest holds before any stage has run."""
    return {
        "config": asdict(config),
        "config_hash": config.hash,
        "seeds": list(config.seeds),
        "versions": versions(),
        "git_revision": git_revision(),
        "hashes": {},
        "seconds": {},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_revision() -> str | None:
    """The revision of the checkout that this package runs from, or None outside one."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
