"""The run folder: manifest, atomic writes, units of finished work, resume."""

import contextlib
import glob
import hashlib
import importlib.metadata
import json
import logging
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_probe.config import StudyConfig, differences, from_dict, hashed_values
from persona_probe.errors import InputError, unknown
from persona_probe.files import as_damaged, read_json, read_parquet, shown
from persona_probe.locks import CROWD_S, PATIENCE_S, alone, brief, empty, held, is_ours, together
from persona_probe.names import recorded
from persona_probe.writing import (
    exchange,
    free_name,
    make_folder,
    refused,
    whole_file,
    write_json,
    write_jsonl,
    write_table,
)

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    import pandas as pd

# --- Where a run's numbers come from: the manifest as it starts, with versions and revision

PACKAGES = (
    "persona-probe",
    "torch",
    "transformers",
    "transformer-lens",
    "sae-lens",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "numpy",
    "pandas",
    "plotly",
)


def first_manifest(config: StudyConfig) -> dict[str, Any]:
    """What a manifest holds before any stage has run."""
    return {
        "config": hashed_values(config),
        "config_hash": config.hash,
        "seeds": list(config.seeds),
        "versions": versions(),
        "git_revision": git_revision(),
        "hashes": {},
        "seconds": {},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    known = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known[package] = importlib.metadata.version(package)
    return known


def git_revision() -> str | None:
    """The revision of the checkout that this package runs from, or None outside one."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


MANIFEST, STAGING = "manifest.json", ".staging"
MANIFEST_KINDS: dict[str, type] = {
    **dict.fromkeys(("config", "hashes", "seconds", "versions", "evaluations"), dict),
    **dict.fromkeys(("seeds", "random_latents"), list),
    **dict.fromkeys(("config_hash", "kind"), str),
    "draw_seed": int,
}
"""What a manifest's values are, where it has them."""
SERVED, INCIDENTS = "serve", "incidents.jsonl"
"""Where `persona-probe serve RUN` writes: a folder of the run, and its file of alarms."""
REFERENCES = "references.json"
"""In the folder of an adopted organism: where the checkpoint of each step lies."""
WRITERS = {
    ("latents.", "steering.", "cards.", "agreement.", "directions.", "sets.", "parts/"): "locate RUN",
    ("readings.", "evals.", "evals_2x2.", "parts/track-"): "track RUN",
    ("parts/realign-",): "realign RUN",
    ("precision.", "parts/precision/"): "precision RUN",
    ("samples.", "judged_steps."): "evaluate RUN",
    ("thoughts.",): "thoughts RUN --read",
    ("safety.", "parts/safety/"): "evaluate RUN --safety",
    ("summary.",): "report RUN",
    ("arms/",): "induce CONFIG",
}
"""Beginnings of the names of a run's files, and the command that writes them; the longest match decides."""


class RunFolder:
    """A study's folder on disk. Nothing in it is half-written: units move in when whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: StudyConfig, overwrite: bool = False) -> "RunFolder":
        """Open or make the folder for `config`; an existing run of the same config is resumed.

        The run of an earlier version is resumed where the config says what it said then: keys that came later hold
        their defaults, and where a default has changed since, the run keeps the earlier one.

        Args:
            overwrite: set another config's run aside, as `<path>.old`; without this only an empty one gives way.

        Raises:
            InputError: the folder holds another config's run, or something that is no run.
        """
        run = cls(path)
        if run._is_of(config, overwrite):
            return run
        make_folder(path)
        # Whoever makes or uses the folder meanwhile is waited for, and then asked again.
        with alone(path, CROWD_S), run._manifest_lock():
            if not run._is_of(config, overwrite):
                if _nothing_finished(path):
                    empty(path)
                else:
                    log.warning("the run of another config is now %s", _set_aside(path))
                run.write_json(MANIFEST, first_manifest(config))
        return run

    def _is_of(self, config: StudyConfig, overwrite: bool) -> bool:
        """Whether the folder is a run of `config`; what may not be replaced is refused."""
        path = self.path
        if (path / MANIFEST).is_file():
            other = self._other_than(config)
            if other is None:
                return True
            if not overwrite and not _nothing_finished(path):
                raise InputError(f"{path} holds the run of another config ({other}): choose another --out")
        elif path.exists() and not (path.is_dir() and _only_leftovers(path)):
            raise InputError(f"{path} exists and is no run folder: choose another --out")
        return False

    def _other_than(self, config: StudyConfig) -> str | None:
        """In what the run's config is another one, in a few words; None where it is the same."""
        manifest = self.manifest
        if manifest.get("config_hash") == config.hash:
            return None
        try:
            known = self.config
        except InputError:
            return "one that this version does not read"
        if other := list(differences(known, config)):
            more = f", and {len(other) - 1} more" if len(other) > 1 else ""
            key, then, now = other[0]
            return f"{key} is {shown(then)} there, not {shown(now)}{more}"
        for key, today, kept in differences(config, known):
            log.warning("%s keeps %s: %s, the default when it was made; today's is %s", self.path, key, kept, today)
        return None

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open an existing run.

        Raises:
            InputError: the folder has no manifest.
        """
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            raise InputError(
                f"{str(path)!r} is no run folder: it has no {MANIFEST}; run `persona-probe run CONFIG` first"
            )
        return cls(folder)

    @classmethod
    def claim(cls, path: Path, kind: str, noun: str, identity: Mapping[str, Any]) -> "RunFolder":
        """Open or make a folder of results that are no study, such as a grid or a labelled study.

        Args:
            kind: what the manifest's `kind` says.
            noun: what an error calls such a folder.
            identity: what decides the folder's numbers; a folder that holds another identity is refused.

        Raises:
            InputError: the folder holds results with another identity, or something else.
        """
        folder = cls(path)
        if not folder.has(MANIFEST) and path.exists() and not (path.is_dir() and _only_leftovers(path)):
            raise InputError(f"{path} exists and is no {noun}: choose another --out")
        make_folder(path)
        with folder._manifest_lock():
            if not folder.has(MANIFEST):
                start = {"versions": versions(), "git_revision": git_revision(), "seconds": {}}
                folder.write_json(MANIFEST, {"kind": kind, **identity, **start})
        differing = [key for key, value in identity.items() if folder.manifest.get(key) != value]
        if differing:
            what = differing[0].replace("config_hash", "settings")
            raise InputError(f"{path} holds a {noun} with other {what}: choose another --out")
        return folder

    # --- Who may write: one process for the folder, one for each unit; readers ask nobody

    def writing(self, shared: bool = False) -> AbstractContextManager[None]:
        """The right to write this folder while a block lasts; blocks of one process may nest.

        Args:
            shared: together with other processes that share it; each makes its own units.

        Raises:
            InputError: another process has it; its id and host are named.
        """
        return together(self.path) if shared else alone(self.path)

    def locked(self, place: str, wait: float = PATIENCE_S) -> AbstractContextManager[None]:
        """The right to make one unit, such as `arms/incorrect-s0`, while a block lasts.

        Several processes that fill one folder together take these, while the one that started them has `writing`.

        Raises:
            InputError: another process has it, for longer than `wait` seconds.
        """
        return held(self.path, place, str(self.path / place), wait)

    def _manifest_lock(self) -> AbstractContextManager[None]:
        return brief(self.path, MANIFEST, str(self.path / MANIFEST))

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it is on disk.

        Raises:
            InputError: it cannot be read.
        """
        change = "restore it, or begin anew with another --out"
        manifest = read_json(self.path / MANIFEST, dict, change)
        for key, kind in MANIFEST_KINDS.items():
            if key in manifest and not isinstance(manifest[key], kind):
                raise InputError(f"{self.path / MANIFEST} is damaged ({key!r} is no {kind.__name__}): {change}")
        return manifest

    @property
    def config(self) -> StudyConfig:
        """The configuration that made this run."""
        manifest = self.manifest
        if not isinstance(manifest.get("config"), dict):
            kind = manifest.get("kind")
            what = f"is a folder of {kind} results, and no study" if kind else f"has no config in its {MANIFEST}"
            raise InputError(f"{self.path} {what}: give the run folder of a study")
        with recorded():
            return from_dict(StudyConfig, manifest["config"], str(self.path / MANIFEST))

    def edit_manifest(self, edit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Change the manifest by a function; no other process changes it between reading and writing.

        Returns:
            The manifest afterwards.
        """
        with self._manifest_lock():
            manifest = self.manifest
            edit(manifest)
            self.write_json(MANIFEST, manifest)
        return manifest

    def update_manifest(self, **changes: Any) -> None:
        """Merge top-level keys into the manifest; dictionaries are merged one level deep."""

        def merge(manifest: dict[str, Any]) -> None:
            for key, value in changes.items():
                both = isinstance(value, dict) and isinstance(manifest.get(key), dict)
                manifest[key] = {**manifest[key], **value} if both else value

        self.edit_manifest(merge)

    def has(self, name: str) -> bool:
        """Whether a file or folder exists (whole, since writes are atomic)."""
        return (self.path / name).exists()

    def write_json(self, name: str, value: Any) -> Path:
        """Write JSON whole or not at all."""
        return write_json(self.path / name, value)

    def write_jsonl(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write JSON lines whole or not at all."""
        return write_jsonl(self.path / name, rows)

    def read_json(self, name: str) -> Any:
        """Read JSON.

        Raises:
            InputError: it does not exist or is damaged; the message names the command that writes it.
        """
        return read_json(self._written(name), object, self._again(name))

    def write_table(self, name: str, frame: "pd.DataFrame") -> Path:
        """Write a parquet table whole or not at all."""
        return write_table(self.path / name, frame)

    def read_table(self, name: str) -> "pd.DataFrame":
        """Read a parquet table.

        Raises:
            InputError: it does not exist or is damaged; the message names the command that writes it.
        """
        return read_parquet(self._written(name), (), self._again(name))

    def _written(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise InputError(f"{path} does not exist yet: run `persona-probe {_writer(name)}` first")
        return path

    def _again(self, name: str) -> str:
        """What to do about a damaged file."""
        return f"move it elsewhere and run `persona-probe {_writer(name)}` again"

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the block's wall seconds for a stage."""
        start = time.monotonic()
        yield
        self.add_seconds(stage, time.monotonic() - start)

    @contextlib.contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A temporary folder that becomes `name` when the block ends well; an interrupted block leaves nothing.

        Raises:
            InputError: another process is making `name`.
        """
        target, flat = self.path / name, name.replace("/", "--")
        scratch = self.path / STAGING / f"{flat}.{uuid.uuid4().hex[:12]}"
        with self.locked(name):
            for leftover in [scratch.with_name(flat), *scratch.parent.glob(f"{glob.escape(flat)}.{'[0-9a-f]' * 12}")]:
                shutil.rmtree(leftover, ignore_errors=True)  # its maker has ended: the lock is ours
            _make_scratch(scratch)
            try:
                yield scratch
                target.parent.mkdir(parents=True, exist_ok=True)
                exchange(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
                with contextlib.suppress(OSError):
                    scratch.parent.rmdir()

    @contextlib.contextmanager
    def outputs(self) -> Iterator[Path]:
        """A temporary folder whose files all take their places in the run when the block ends well, or none does.

        Raises:
            InputError: another process is writing outputs.
        """
        scratch = self.path / STAGING / f"outputs.{uuid.uuid4().hex[:12]}"
        with self.locked("outputs"):
            for leftover in scratch.parent.glob(f"outputs.{'[0-9a-f]' * 12}"):
                shutil.rmtree(leftover, ignore_errors=True)  # its maker has ended: the lock is ours
            _make_scratch(scratch)
            try:
                yield scratch
                for file in sorted(p for p in scratch.rglob("*") if p.is_file()):
                    target = self.path / file.relative_to(scratch)
                    with refused("write", target):
                        target.parent.mkdir(parents=True, exist_ok=True)
                        file.replace(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
                with contextlib.suppress(OSError):
                    scratch.parent.rmdir()

    def take(self, place: str, source: Path) -> None:
        """Copy a finished unit of another run, a file or a folder: it appears whole or not at all."""
        if source.is_dir():
            with self.staging(place) as folder:
                shutil.copytree(source, folder, dirs_exist_ok=True)
        else:
            with self.locked(place), whole_file(self.path / place) as scratch:
                shutil.copyfile(source, scratch)

    def finished(self, place: str, settings: Mapping[str, Any], record: str, change: str) -> bool:
        """Whether the unit `place` is whole, and was made with these settings.

        Args:
            place: the unit's folder inside the run.
            settings: what decides the unit's numbers, as plain JSON values.
            record: the unit's file that holds them (under the key `settings`, where it holds more).
            change: what an error tells the user to change.

        Raises:
            InputError: the unit was made with other settings.
        """
        if not self.has(place):
            return False
        record_settings = read_json(self._written(f"{place}/{record}"), dict, f"move {self.path / place} elsewhere")
        if not same_settings(record_settings.get("settings", record_settings), json.loads(json.dumps(settings))):
            raise InputError(f"{self.path / place} was made with other settings: {change}")
        return True

    def checkpoint(self, arm: str, seed: int, step: int) -> Path | None:
        """The folder of an organism; None for step 0, which is the base model.

        Raises:
            InputError: there is no such checkpoint; the steps that exist are listed. Or a file is damaged, or an
                adopted checkpoint is no longer where it was.
        """
        if step == 0:
            return None
        steps = self.steps(arm, seed)
        if step not in steps:
            raise InputError(f"no checkpoint of arm {arm!r}, seed {seed} at step {step}: there are {steps}")
        name = f"arms/{arm}-s{seed}/checkpoint-{step}"
        path = self.place(name)
        if not path.is_dir():
            raise InputError(
                f"the checkpoint of arm {arm!r}, seed {seed} at step {step} is no longer in {path}: put it back there, "
                "or a link to it, or adopt it again with another --out"
            )
        self._verify(path, name)
        return path

    def steps(self, arm: str, seed: int) -> list[int]:
        """Steps of an arm's checkpoints, ascending.

        Raises:
            InputError: that arm and seed have not been trained; the ones that have are listed.
        """
        folder = self.path / "arms" / f"{arm}-s{seed}"
        numbers = (p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*"))
        own = {int(number) for number in numbers if number.isdecimal()}
        steps = sorted(own | self.references(folder.name).keys())
        if not steps:
            names = sorted(p.name for p in (self.path / "arms").glob("*-s*")) if self.has("arms") else []
            raise unknown("organism", folder.name, names)
        return steps

    def references(self, organism: str) -> dict[int, Path]:
        """The folders of an adopted organism's checkpoints (`incorrect-s0`) that stay where they were, by step."""
        record = self.path / "arms" / organism / REFERENCES
        known = read_json(record) if record.is_file() else {}
        with as_damaged(record, "adopt the checkpoints again with another --out"):
            places = {int(step): (Path(one["path"]), self.path / one["from_run"]) for step, one in known.items()}
        # a run and its checkpoints that have moved together are found by the way from one to the other
        return {s: near if near.is_dir() and not stated.is_dir() else stated for s, (stated, near) in places.items()}

    def place(self, name: str) -> Path:
        """Where a file or folder of the run lies: inside it, or where an adopted checkpoint was found."""
        parts = Path(name).parts
        if len(parts) > 2 and parts[0] == "arms" and (step := parts[2].removeprefix("checkpoint-")).isdigit():
            folder = self.references(parts[1]).get(int(step))
            if folder is not None:
                return folder.joinpath(*parts[3:])
        return self.path / name

    def _verify(self, folder: Path, name: str) -> None:
        adopted = folder != self.path / name
        again = f"move {folder.parent} elsewhere and run again: it is made anew"
        change = "adopt it again with another --out" if adopted else again
        for stated, expected in self.manifest.get("hashes", {}).items():
            if not stated.startswith(f"{name}/"):
                continue
            file = folder / stated.removeprefix(f"{name}/")
            if not file.is_file():
                raise InputError(f"{file} is missing: restore it, or {change}")
            if file_sha256(file) != expected:
                raise InputError(f"{file} does not match its sha256 in {MANIFEST}: {change}")

    def record_hashes(self, folder: Path, name: str | None = None) -> None:
        """Record the sha256 of a weights file, or of all below a folder, in the manifest.

        `name` is the final place of a folder of `staging`: recorded before the move, no finished unit lacks its hashes.
        """
        place = Path(name) if name else folder.relative_to(self.path)
        files = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
        self.update_manifest(hashes={str(place / f.relative_to(folder)): file_sha256(f) for f in files})

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add to a stage's wall time; the lost work of an interrupted run is not counted."""

        def add(manifest: dict[str, Any]) -> None:
            known = manifest.setdefault("seconds", {})
            known[stage] = round(known.get(stage, 0.0) + seconds, 2)

        self.edit_manifest(add)


NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def same_settings(recorded: Any, settings: Any) -> bool:
    """Whether two settings of a unit, as plain JSON values, are the same.

    A key that only one of them has came with a later version than the other: it must hold nothing there.
    """
    if not (isinstance(recorded, dict) and isinstance(settings, dict)):
        return bool(recorded == settings)
    both = recorded.keys() & settings.keys()
    alone = [side[key] for side in (recorded, settings) for key in side.keys() - both]
    return all(value in NOTHING for value in alone) and all(same_settings(recorded[k], settings[k]) for k in both)


def _only_leftovers(path: Path) -> bool:
    """Whether a folder holds only what a run leaves that stopped before its manifest was written."""
    return all(p.name.startswith(f".{MANIFEST}") or is_ours(p) for p in path.iterdir())


def _set_aside(path: Path) -> Path:
    """Move all that a run holds to a folder next to it, the manifest last; the locks stay, one of which is held."""
    place = path.resolve()
    aside = free_name(place.with_name(f"{place.name}.old"))
    with refused("set the earlier run aside as", aside):
        aside.mkdir()
        for entry in sorted(place.iterdir(), key=lambda p: p.name == MANIFEST):
            if not is_ours(entry):
                entry.replace(aside / entry.name)
    return aside


def _make_scratch(path: Path) -> None:
    """Make a folder of `.staging`, which another process that leaves it empty may be removing."""
    for _ in range(100):
        with refused("make", path), contextlib.suppress(FileNotFoundError):
            return path.mkdir(parents=True)
    raise InputError(f"could not make {path}: choose another --out")


def _writer(name: str) -> str:
    """The command that writes a file of a run."""
    known = {start: command for starts, command in WRITERS.items() for start in starts if name.startswith(start)}
    return known[max(known, key=len)] if known else "run CONFIG"


def _nothing_finished(path: Path) -> bool:
    """Whether a run holds its manifest and unfinished work only."""
    return all(p.name == MANIFEST or p.name.startswith(".") for p in path.iterdir())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
