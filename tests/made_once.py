"""Folders that take long to make: the first worker of a test session that needs one makes it, for all of them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from persona_probe.study.study import Study


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name`, which `make` fills, given its path. All workers read it, so no test may change it."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, whole = root / name, root / f"{name}.whole"
    with FileLock(root / f"{name}.lock"):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


def own_copy(factory: pytest.TempPathFactory, run: Path) -> Study:
    """A run that `made_once` holds, copied for this worker: opening a run for writing locks it."""
    return Study.open(shutil.copytree(run, factory.mktemp(run.parent.name) / "run"))
