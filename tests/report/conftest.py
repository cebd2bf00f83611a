from pathlib import Path

import pytest
from made_up import write_run

from persona_probe.report import Records, load_records


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def records(run_folder: Path) -> Records:
    return load_records(run_folder)
