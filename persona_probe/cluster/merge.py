"""Join run folders that were made apart: the same config, other units. Every unit is copied whole, tables are made."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from persona_probe.errors import InputError
from persona_probe.files import read_json, read_jsonl
from persona_probe.locks import RUN, InUse, alone, owner
from persona_probe.runs import MANIFEST, RunFolder, file_sha256
from persona_probe.writing import write_json

log = logging.getLogger(__name__)

UNIT_FOLDERS = ("arms", "parts", "realign", "cells", "runs")
"""Folders of a run whose entries are units, each a file or a folder."""
UNITS = (
    *("base", "features", "general.jsonl"),  # of a grid of mitigations, of a study of the monitor
    *("agreement.parquet", "directions.safetensors", "directions.json", "cards.json", "samples.jsonl"),
)
"""Units outside of those folders. What is not named here or above is made from units, and is made again."""
TABLES = ("realign/doses.parquet",)
"""Tables that lie among units."""
TIMES = ("seconds", "seconds_per_step", "training_seconds", "time", "peak_memory_gib")
"""Keys of JSON records that differ from run to run."""
SAME = ("kind", "config_hash", "draw_seed", "study", "latents", "rows")
"""Entries of the manifest that decide a run's numbers."""


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    copied: tuple[str, ...]
    """Units that the run did not have."""
    kept: int
    """Units that it had already, with the same content."""
    tables: tuple[str, ...]
    """Tables that were joined again."""


def merge(run: str | Path, others: Sequence[str | Path], any_versions: bool = False) -> Merged:
    """Copy the units of other run folders of the same config into a run, and join its tables in their usual order.

    Nothing is copied before all folders have been compared. It resumes if interrupted: what is there is kept.

    Args:
        run: a run folder, or a new one.
        others: folders that other processes or machines have filled.
        any_versions: take folders that other versions of Python or packages made.

    Raises:
        InputError: folders of another config, of other versions or of other input data; a unit that two of them have
            with different content (it is named); or one that a process is writing.
    """
    folders = [RunFolder.open(other) for other in others]
    target = _target(Path(run), folders)
    with alone(target.path):
        for folder in folders:
            _check_same(target, folder, any_versions)
        found = [(folder, place) for folder in folders for place in units(folder.path)]
        missing = _missing(target, found)
        for place, folder in missing.items():
            log.info("taking %s of %s", place, folder.path)
            target.take(place, folder.path / place)
        _merge_manifests(target, folders)
        return Merged(tuple(missing), len({place for _, place in found}) - len(missing), _join(target))


def units(folder: Path) -> list[str]:
    """The finished units of a run folder, by their places; those that say that others are whole come last."""
    places = [name for name in UNITS if (folder / name).exists()]
    for name in UNIT_FOLDERS:
        entries = sorted(p.name for p in (folder / name).iterdir()) if (folder / name).is_dir() else []
        places += [f"{name}/{entry}" for entry in entries if not entry.startswith(".")]
    return sorted(
        (p for p in places if _is_whole(folder, p)), key=lambda place: (place.endswith(".evals.parquet"), place)
    )


def _is_whole(folder: Path, place: str) -> bool:
    """Readings without their items are of a unit that is not finished; so is a folder of checkpoints' tables."""
    path = folder / place
    if place in TABLES:
        return False
    if place.startswith(("parts/track-", "parts/realign-")):
        return path.is_file() and (folder / f"{place.split('.')[0]}.evals.parquet").is_file()
    return True


# --- May they be joined?


def _target(path: Path, folders: Sequence[RunFolder]) -> RunFolder:
    """The run; a new one starts with the manifest of the first folder."""
    if (path / MANIFEST).is_file():
        return RunFolder.open(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists and is no run folder: choose another RUN")
    path.mkdir(parents=True, exist_ok=True)
    start = {"hashes": {}, "seconds": {}}
    head = {key: value for key, value in folders[0].manifest.items() if key not in (*start, "merged", "table_hashes")}
    write_json(path / MANIFEST, {**head, **start})
    return RunFolder.open(path)


def _check_same(target: RunFolder, other: RunFolder, any_versions: bool) -> None:
    here, there = target.manifest, other.manifest
    if target.path.resolve() == other.path.resolve():
        raise InputError(f"{other.path} is the run itself: name other folders")
    if (name := owner(other.path, RUN)) is not None:
        raise InUse(f"{other.path} is in use by {name}: wait until it ends")
    for key in SAME:
        if here.get(key, there.get(key)) != there.get(key, here.get(key)):
            what = "of another config" if key == "config_hash" else f"with another {key}"
            raise InputError(f"{other.path} is a run {what}: only runs of one config can be merged")
    for name, version in {} if any_versions else _differing(here.get("versions", {}), there.get("versions", {})):
        raise InputError(f"{other.path} was made with {name} {version}: run it again, or pass --any-versions")
    for name, _ in _differing(here.get("input_hashes", {}), there.get("input_hashes", {})):
        raise InputError(f"{other.path} was made from another {name}: only runs of the same inputs can be merged")
    if here.get("git_revision") != there.get("git_revision"):
        log.warning("%s was made by another revision of the code", other.path)


def _differing(here: Mapping[str, Any] | Any, there: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in there.items() if here.get(name, value) != value)


def _missing(target: RunFolder, found: Sequence[tuple[RunFolder, str]]) -> dict[str, RunFolder]:
    """Places that the run lacks, each with a folder that has it.

    Raises:
        InputError: two folders have one place with different content, or weights are damaged.
    """
    first: dict[str, RunFolder] = {}
    for folder, place in found:
        _check_weights(folder, place)
        known = target if target.has(place) else first.setdefault(place, folder)
        if known is not folder and (file := _difference(known.path / place, folder.path / place)) is not None:
            raise InputError(
                f"{file} is not the same in {known.path} and in {folder.path}: merge only one of them, or make the "
                "unit again on one kind of machine"
            )
    return {place: folder for place, folder in first.items() if not target.has(place)}


def _check_weights(folder: RunFolder, place: str) -> None:
    hashes: Mapping[str, str] = folder.manifest.get("hashes", {})
    path = folder.path / place
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else []:
        expected = hashes.get(str(file.relative_to(folder.path)))
        if expected is not None and file_sha256(file) != expected:
            raise InputError(f"{file} does not match its sha256 in {MANIFEST}: make {place} of {folder.path} again")


def _difference(here: Path, there: Path) -> Path | None:
    """The first file that differs between two units; times and the order of a set in JSON do not count."""
    if here.is_dir() != there.is_dir():
        return there
    if not here.is_dir():
        return None if _same(here, there) else there
    files = {p.relative_to(root) for root in (here, there) for p in root.rglob("*") if p.is_file()}
    for file in sorted(files):
        if not ((here / file).is_file() and (there / file).is_file() and _same(here / file, there / file)):
            return there / file
    return None


def _same(here: Path, there: Path) -> bool:
    if here.read_bytes() == there.read_bytes():
        return True
    if here.suffix not in (".json", ".jsonl"):
        return False
    read = read_jsonl if here.suffix == ".jsonl" else partial(read_json, kind=object)
    return _timeless(read(here)) == _timeless(read(there))


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(entry) for key, entry in value.items() if key not in TIMES}
    if isinstance(value, list):
        entries = [_timeless(entry) for entry in value]
        return sorted(entries) if all(isinstance(entry, str) for entry in entries) else entries
    return value


# --- What is made from the units


def _merge_manifests(target: RunFolder, folders: Sequence[RunFolder]) -> None:
    """Hashes of weights and inputs, evaluations, and the seconds of all; a folder that is merged again counts once."""

    def merge_into(manifest: dict[str, Any]) -> None:
        counted = manifest.setdefault("merged", {})
        for folder in folders:
            other = folder.manifest
            for key in other.keys() - {"seconds", "merged", "table_hashes"}:
                both = isinstance(other[key], dict) and isinstance(manifest.get(key, {}), dict)
                manifest[key] = {**other[key], **manifest.get(key, {})} if both else manifest.get(key, other[key])
            name = f"{folder.path.name}-{sha256(str(folder.path.resolve()).encode()).hexdigest()[:8]}"
            for stage, seconds in other.get("seconds", {}).items():
                further = seconds - counted.get(name, {}).get(stage, 0.0)
                manifest["seconds"][stage] = round(manifest["seconds"].get(stage, 0.0) + further, 2)
            counted[name] = other.get("seconds", {})

    target.edit_manifest(merge_into)


def _join(run: RunFolder) -> tuple[str, ...]:
    """Make the tables of the units that are there; returns their names."""
    if "kind" in run.manifest:  # grids and studies of the monitor: their own command makes the tables
        return ()
    from persona_probe.context import Context
    from persona_probe.latents.stage import merge_tables
    from persona_probe.monitor.track import merge_parts
    from persona_probe.study.two_by_two import TABLE, join_2x2

    ctx, names = Context(run), list[str]()
    models = dict.fromkeys(("base", ctx.config.realign.start))
    if all(run.has(f"parts/effects-{model}.parquet") for model in models):
        merge_tables(ctx)
        names += ["latents.parquet", "steering.parquet"]
    if run.has("parts/track-base.evals.parquet"):
        merge_parts(ctx)
        names += ["readings.parquet", "evals.parquet"]
    if join_2x2(ctx):
        names.append(TABLE)
    return tuple(names)
