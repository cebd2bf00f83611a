"""Does a run folder still hold what its manifest says, and are its inputs still what it was made from?"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_probe.errors import InputError
from persona_probe.fingerprints import INPUTS, TABLES, input_hashers, table_hash
from persona_probe.provenance import git_revision, versions
from persona_probe.runs import RunFolder

MATCHES, DIFFERS, MISSING, UNCHECKED = "matches", "differs", "missing", "not checked"


@dataclass(frozen=True)
class Finding:
    """One thing that was compared with the manifest."""

    name: str
    """A file of the run, or an input."""
    state: str
    """`matches`, `differs`, `missing` or `not checked`."""
    detail: str = ""
    """Why, and what to do; empty where it matches."""

    @property
    def bad(self) -> bool:
        """Whether the run is not what its manifest says."""
        return self.state in (DIFFERS, MISSING)


def verify(folder: str | Path) -> list[Finding]:
    """Recompute every hash that a run's manifest holds, and say what cannot be checked. Nothing is changed.

    Returns:
        Findings in this order: config, checkpoints and other weights, tables, inputs, software.

    Raises:
        InputError: not a run folder, or a manifest that cannot be read.
    """
    run = RunFolder.open(folder)
    manifest = run.manifest
    return [
        _config(manifest),
        *_files(run.path, manifest.get("hashes", {}), "made again by its stage, or changed since"),
        *_unrecorded(run.path, manifest.get("hashes", {})),
        *_tables(run.path, manifest),
        *_inputs(run, manifest),
        *_software(manifest),
    ]


def _config(manifest: Mapping[str, Any]) -> Finding:
    if "config" not in manifest or "config_hash" not in manifest:
        return Finding("config", UNCHECKED, "the manifest holds no config or no hash of it")
    # of the config as it stands there: a newer version of this package may know more keys
    now = hashlib.sha256(json.dumps(manifest["config"], sort_keys=True).encode()).hexdigest()[:12]
    return _compared("config", now, manifest["config_hash"], "the manifest's config was edited after the run began")


def _files(root: Path, recorded: Mapping[str, str], why: str) -> Iterator[Finding]:
    for name, wanted in sorted(recorded.items()):
        if not (root / name).is_file():
            yield Finding(name, MISSING, "on record, but not in the folder")
        else:
            yield _compared(name, table_hash(root / name), wanted, why)


def _unrecorded(root: Path, recorded: Mapping[str, str]) -> Iterator[Finding]:
    for path in sorted((root / "arms").rglob("*.safetensors")):
        name = path.relative_to(root).as_posix()
        if name not in recorded:
            yield Finding(name, UNCHECKED, "no hash on record")


def _tables(root: Path, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    if TABLES not in manifest:
        yield Finding("tables", UNCHECKED, "no hashes on record: `persona-probe report RUN` notes them")
    yield from _files(root, manifest.get(TABLES, {}), "changed since the report: run `persona-probe report RUN`")


def _inputs(run: RunFolder, manifest: Mapping[str, Any]) -> Iterator[Finding]:
    recorded = {**_quality_on_record(run.path), **manifest.get(INPUTS, {})}
    for name, hasher in input_hashers(run.config).items():
        wanted = recorded.get(name)
        if wanted is None and name != "model":
            yield Finding(name, UNCHECKED, "no hash on record")
            continue
        try:
            now = hasher()
        except InputError as error:
            yield Finding(name, MISSING if wanted else UNCHECKED, str(error))
            continue
        yield _input(name, now, wanted, run)


def _input(name: str, now: str | None, wanted: str | None, run: RunFolder) -> Finding:
    if now is None:
        return Finding(name, UNCHECKED, f"on the hub, revision {run.config.revision or 'not pinned'}")
    if wanted is None:
        return Finding(name, UNCHECKED, "no hash on record")
    return _compared(name, now, wanted, "not what the run was made from")


def _quality_on_record(root: Path) -> dict[str, str]:
    """The SAE's sha256 as the summary quotes it: runs of earlier versions have no other."""
    path = root / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError:
        return {}  # damaged: its own hash says so
    digest = (summary.get("sae_quality") or {}).get("sha256")
    return {"SAE/sae_weights.safetensors": digest} if digest else {}


def _software(manifest: Mapping[str, Any]) -> Iterator[Finding]:
    recorded, here = manifest.get("versions", {}), versions()
    others = [f"{name} {v} (here {here.get(name, 'none')})" for name, v in recorded.items() if here.get(name) != v]
    if others:
        yield Finding("versions", UNCHECKED, f"made with {', '.join(others)}")
    made, now = manifest.get("git_revision"), git_revision()
    if made != now:
        yield Finding("revision", UNCHECKED, f"made at {made or 'no revision'}, here {now or 'none'}")


def _compared(name: str, now: str, wanted: str, why: str) -> Finding:
    if now == wanted:
        return Finding(name, MATCHES)
    return Finding(name, DIFFERS, f"{now[:12]}, on record {wanted[:12]}: {why}")
