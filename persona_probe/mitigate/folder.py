"""The folder of a grid: made, resumed, or refused."""

from pathlib import Path
from typing import Any

from persona_probe.errors import InputError
from persona_probe.mitigate.config import Grid
from persona_probe.provenance import git_revision, versions
from persona_probe.runs import MANIFEST, RunFolder


def open_folder(path: Path, grid: Grid, made_by: dict[str, Any]) -> RunFolder:
    """The grid's folder, made or resumed.

    Raises:
        InputError: it holds something else, or cells of other shared settings, study or rows.
    """
    folder, wanted = RunFolder(path), {"config_hash": grid.hash, **made_by}
    if folder.has(MANIFEST):
        held = folder.manifest
        differs = [key for key, value in wanted.items() if held.get(key) != value]
        if differs:
            what = differs[0].replace("config_hash", "settings")
            raise InputError(f"{path} holds a grid of other {what}: choose another --out")
    elif path.exists() and any(path.iterdir()):
        raise InputError(f"{path} exists and is no grid of mitigations: choose another --out")
    else:
        start = {"versions": versions(), "git_revision": git_revision(), "seconds": {}}
        folder.write_json(MANIFEST, {"kind": "mitigations", **wanted, **start})
    return folder
