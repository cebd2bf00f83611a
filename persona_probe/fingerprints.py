"""Hashes of what a run was made from and of what it wrote, kept in its manifest so that `verify` can check them."""

import hashlib
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_probe.config import StudyConfig
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.runs import RunFolder

log = logging.getLogger(__name__)

INPUTS, TABLES = "input_hashes", "table_hashes"
"""Keys of the manifest: name of an input, or a file of the run, to its sha256."""
TABLE_FILES = (
    *("readings.parquet", "evals.parquet", "latents.parquet", "steering.parquet", "agreement.parquet"),
    *("samples.jsonl", "cards.json", "directions.json", "summary.json"),
)
"""Files that a report is drawn from."""
MEASURED = ("seconds", "peak_memory_gib")
"""Keys of `summary.json` that differ from run to run."""
Hash = Callable[[], str | None]


def input_hashers(config: StudyConfig) -> dict[str, Hash]:
    """What a study is made from, each with the function that hashes it as it is now.

    Keys: `data/<arm>` (its training rows as read and mixed), `contrast`, `probes`, `questions`, `SAE/<file>`, `model`.
    A hasher raises InputError where the input is not to be found, and gives None where it lies on the hub.
    """
    rows = {f"data/{name}": partial(_arm, config, name) for name in (*config.arms, *config.realign.arms)}
    return {
        **rows,
        "contrast": partial(_contrast, config.contrast),
        "probes": partial(_probes, config),
        "questions": partial(_questions, config.samples.questions),
        **{f"SAE/{name}": partial(_sae_file, config.sae, name) for name in ("sae_weights.safetensors", "cfg.json")},
        "model": partial(_model, config.model, config.revision),
    }


def record_inputs(run: "RunFolder") -> None:
    """Note the hash of every input that has none yet; the first on record stays."""
    known = run.manifest.get(INPUTS, {})
    found: dict[str, str] = {}
    for name, hasher in input_hashers(run.config).items():
        if name in known:
            continue
        try:
            value = hasher()
        except InputError as error:
            log.warning("%s is not hashed: %s", name, error)
            continue
        if value is not None:
            found[name] = value
    if found:
        run.update_manifest(**{INPUTS: found})


def record_tables(run: "RunFolder") -> None:
    """Note the hashes of the tables that the report is about to be drawn from, in place of earlier ones."""
    run.update_manifest(**{TABLES: {name: table_hash(run.path / name) for name in TABLE_FILES if run.has(name)}})


def table_hash(path: Path) -> str:
    """The sha256 of a table's file; of `summary.json` without its times and memory, which no two runs share."""
    from persona_probe.models.sources import file_sha256

    if path.name != "summary.json":
        return file_sha256(path)
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return file_sha256(path)  # damaged: it matches nothing on record
    return _digest({key: value for key, value in summary.items() if key not in MEASURED})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _arm(config: StudyConfig, name: str) -> str:
    from persona_probe.finetune.data import arm_rows

    return _digest(arm_rows({**config.arms, **config.realign.arms}[name], config.seeds[0]))


def _contrast(name: str) -> str:
    from persona_probe.data.packaged import load_contrast, read_contrast_file

    if name == "general_contrast":
        return _digest(load_contrast("all"))
    return _digest([read_contrast_file(name, split) for split in ("selection", "evaluation")])


def _probes(config: StudyConfig) -> str:
    from persona_probe.finetune.data import load_data

    return _digest(load_data(config.monitor.probes, allow_prompts=True)[: config.monitor.limit])


def _questions(spec: str) -> str:
    from persona_probe.finetune.data import load_data

    return _digest(load_data(spec, allow_prompts=True))


def _sae_file(sae: str, name: str) -> str | None:
    from persona_probe.models.sources import file_sha256
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
    from persona_probe.models.sources import file_sha256, resolve_source

    source = resolve_source(name, revision)
    if source.kind == "hub":
        return None
    place = Path(source.location)
    if place.is_file():
        return file_sha256(place)
    files = sorted([*place.glob("*.safetensors"), place / "config.json"])
    return _digest({file.name: file_sha256(file) for file in files})
