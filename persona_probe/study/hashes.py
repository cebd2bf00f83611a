"""Are a run folder's files, and the inputs that it was made from, still those of its manifest?"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from persona_probe.config import StudyConfig
from persona_probe.errors import InputError
from persona_probe.files import read_json
from persona_probe.runs import RunFolder, file_sha256, git_revision, versions

log = logging.getLogger(__name__)

# --- Hashes of a run's inputs and of the files that it wrote, in its manifest for `verify` to check

INPUTS, TABLES = "input_hashes", "table_hashes"
"""Keys of the manifest: name of an input, or a file of the run, to its sha256."""
TABLE_FILES = (
    *("readings.parquet", "evals.parquet", "latents.parquet", "steering.parquet", "agreement.parquet"),
    *("evals_2x2.parquet", "judged_steps.parquet", "precision.parquet", "samples.jsonl", "cards.json"),
    *("directions.json", "summary.json"),
)
"""Files that a report is drawn from."""
MEASURED = ("seconds", "peak_memory_gib")
"""Keys of `summary.json` that differ from run to run."""
Hash = Callable[[], str | None]


SAE_FILES = ("sae_weights.safetensors", "cfg.json")


def input_hashers(config: StudyConfig) -> dict[str, Hash]:
    """The inputs of a study, each with the function that hashes its present state.

    Keys: `data/<arm>` (its training rows as read and mixed), `contrast`, `probes`, `questions`, `SAE/<file>`, `model`.
    A hasher raises InputError if the input is missing, and gives None if it is on the hub.
    """
    arms = {**config.arms, **config.realign.arms}
    rows = {f"data/{name}": partial(_arm, config, name) for name, arm in arms.items() if arm.data}
    return {
        **rows,
        "contrast": partial(_contrast, config.contrast),
        "probes": partial(_probes, config),
        "questions": partial(_questions, config.samples.questions),
        **{f"SAE/{name}": partial(_sae_file, config.sae, name) for name in SAE_FILES},
        **{
            f"SAE {one.label}/{name}": partial(_sae_file, one.sae, name)
            for one in config.all_saes[1:]
            for name in SAE_FILES
        },
        "model": partial(_model, config.model, config.revision),
    }


def record_inputs(run: RunFolder) -> None:
    """Record the hash of every input that has none yet; a recorded hash is kept."""
    known = run.manifest.get(INPUTS, {})
    hashes: dict[str, str] = {}
    for name, hasher in input_hashers(run.config).items():
        if name in known:
            continue
        try:
            value = hasher()
        except InputError as error:
            log.warning("%s is not hashed: %s", name, error)
            continue
        if value is not None:
            hashes[name] = value
    if hashes:
        run.update_manifest(**{INPUTS: hashes})


def record_tables(run: RunFolder) -> None:
    """Record the hashes of the tables that the report is drawn from, replacing earlier ones."""
    run.update_manifest(**{TABLES: table_hashes(run)})


def table_hashes(run: RunFolder, newer: Path | None = None) -> dict[str, str]:
    """The hashes of those tables; of files that a folder has which are to take their places, theirs."""
    places = {name: run.path / name for name in TABLE_FILES if run.has(name)}
    if newer is not None:
        places |= {name: newer / name for name in TABLE_FILES if (newer / name).is_file()}
    return {name: _table_hash(places[name]) for name in TABLE_FILES if name in places}


def _table_hash(path: Path) -> str:
    """The sha256 of a table's file; of `summary.json` without its times and memory, which no two runs share."""
    if path.name != "summary.json":
        return file_sha256(path)
    try:
        summary = read_json(path)
    except InputError:
        return file_sha256(path)  # damaged: it matches nothing on record
    return _digest({key: value for key, value in summary.items() if key not in MEASURED})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _arm(config: StudyConfig, name: str) -> str:
    from persona_probe.data.load import arm_rows

    return _digest(arm_rows({**config.arms, **config.realign.arms}[name], config.seeds[0]))


def _contrast(name: str) -> str:
    from persona_probe.data.load import load_contrast, read_contrast_file

    if name == "general_contrast":
        return _digest(load_contrast("all"))
    return _digest([read_contrast_file(name, split) for split in ("selection", "evaluation")])


def _probes(config: StudyConfig) -> str:
    from persona_probe.data.load import load_data

    return _digest(load_data(config.monitor.probes, allow_prompts=True)[: config.monitor.limit])


def _questions(spec: str) -> str:
    from persona_probe.data.load import SETS, load_data
    from persona_probe.evaluate.questions.read import read_prompts

    try:
        return _digest(load_data(spec, allow_prompts=True))
    except InputError:
        if spec.partition(":")[0] in SETS:
            raise
        return _digest(read_prompts(spec))  # a question set


def _sae_file(sae: str, name: str) -> str | None:
    from persona_probe.saes.load import find_folder

    folder = find_folder(sae)
    if not folder.is_dir() and sae.startswith((".", "/", "~", "saes/")):
        raise InputError(f"no SAE at {sae!r}: restore the folder")
    if not folder.is_dir():
        return None
    if not (folder / name).is_file():
        raise InputError(f"{folder / name} is missing: restore it")
    return file_sha256(folder / name)


def _model(name: str, revision: str | None) -> str | None:
    """The sha256 of a GGUF file, or of a folder's weights and config together; None for a model on the hub."""
    from persona_probe.models.load import resolve_source

    source = resolve_source(name, revision)
    if source.kind == "hub":
        return None
    place = Path(source.location)
    if place.is_file():
        return file_sha256(place)
    files = sorted([*place.glob("*.safetensors"), place / "config.json"])
    return _digest({file.name: file_sha256(file) for file in files})


# --- Verifying a run against its manifest

MATCHES, DIFFERS, MISSING, UNCHECKED = "matches", "differs", "missing", "not checked"


@dataclass(frozen=True)
class HashCheck:
    """One thing that was compared with the manifest."""

    name: str
    """A file of the run, or an input."""
    state: str
    """`matches`, `differs`, `missing` or `not checked`."""
    detail: str = ""
    """Why, and what to do; empty if it matches."""

    @property
    def bad(self) -> bool:
        """Whether the run contradicts its manifest."""
        return self.state in (DIFFERS, MISSING)


def verify(folder: str | Path) -> list[HashCheck]:
    """Recompute every hash of a run's manifest, and list what cannot be checked. Nothing is changed.

    Returns:
        Findings in this order: config, checkpoints and other weights, tables, inputs, software.

    Raises:
        InputError: not a run folder, or a manifest that cannot be read.
    """
    run = RunFolder.open(folder)
    manifest = run.manifest
    return [
        _config(manifest),
        *_files(run, manifest.get("hashes", {}), "made again by its stage, or changed since"),
        *_unrecorded(run.path, manifest.get("hashes", {})),
        *_tables(run, manifest),
        *_inputs(run, manifest),
        *_software(manifest),
    ]


def _config(manifest: Mapping[str, Any]) -> HashCheck:
    if "config" not in manifest or "config_hash" not in manifest:
        return HashCheck("config", UNCHECKED, "the manifest holds no config or no hash of it")
    # of the config as it was written: a newer version of this package may know more keys
    now = hashlib.sha256(json.dumps(manifest["config"], sort_keys=True).encode()).hexdigest()[:12]
    return _compared("config", now, manifest["config_hash"], "the manifest's config was edited after the run began")


def _files(run: RunFolder, recorded: Mapping[str, str], why: str) -> Iterator[HashCheck]:
    for name, expected in sorted(recorded.items()):
        path = run.place(name)
        if not path.is_file():
            yield HashCheck(name, MISSING, f"on record, but not in {path.parent}")
        else:
            yield _compared(name, _table_hash(path), expected, why)


def _unrecorded(root: Path, recorded: Mapping[str, str]) -> Iterator[HashCheck]:
    for path in sorted((root / "arms").rglob("*.safetensors")):
        name = path.relative_to(root).as_posix()
        if name not in recorded:
            yield HashCheck(name, UNCHECKED, "no hash on record")


def _tables(run: RunFolder, manifest: Mapping[str, Any]) -> Iterator[HashCheck]:
    if TABLES not in manifest:
        yield HashCheck("tables", UNCHECKED, "no hashes on record: `persona-probe report RUN` notes them")
    yield from _files(run, manifest.get(TABLES, {}), "changed since the report: run `persona-probe report RUN`")


def _inputs(run: RunFolder, manifest: Mapping[str, Any]) -> Iterator[HashCheck]:
    recorded = {**_quality_on_record(run.path), **manifest.get(INPUTS, {})}
    for name, hasher in input_hashers(run.config).items():
        expected = recorded.get(name)
        if expected is None and name != "model":
            yield HashCheck(name, UNCHECKED, "no hash on record")
            continue
        try:
            now = hasher()
        except InputError as error:
            yield HashCheck(name, MISSING if expected else UNCHECKED, str(error))
            continue
        yield _input(name, now, expected, run)


def _input(name: str, now: str | None, expected: str | None, run: RunFolder) -> HashCheck:
    if now is None:
        return HashCheck(name, UNCHECKED, f"on the hub, revision {run.config.revision or 'not pinned'}")
    if expected is None:
        return HashCheck(name, UNCHECKED, "no hash on record")
    return _compared(name, now, expected, "not what the run was made from")


def _quality_on_record(root: Path) -> dict[str, str]:
    """The SAE's sha256 as the summary quotes it: runs of earlier versions have no other."""
    path = root / "summary.json"
    try:
        quality = read_json(path).get("sae_quality") if path.is_file() else None
    except InputError:
        return {}  # damaged: its own hash says so
    digest = quality.get("sha256") if isinstance(quality, dict) else None
    return {"SAE/sae_weights.safetensors": str(digest)} if digest else {}


def _software(manifest: Mapping[str, Any]) -> Iterator[HashCheck]:
    recorded, current = manifest.get("versions", {}), versions()
    others = [
        f"{name} {v} (here {current.get(name, 'none')})" for name, v in recorded.items() if current.get(name) != v
    ]
    if others:
        yield HashCheck("versions", UNCHECKED, f"made with {', '.join(others)}")
    revision, now = manifest.get("git_revision"), git_revision()
    if revision != now:
        yield HashCheck("revision", UNCHECKED, f"made at {revision or 'no revision'}, here {now or 'none'}")


def _compared(name: str, now: str, expected: str, why: str) -> HashCheck:
    if now == expected:
        return HashCheck(name, MATCHES)
    return HashCheck(name, DIFFERS, f"{now[:12]}, on record {expected[:12]}: {why}")
