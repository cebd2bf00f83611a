from pathlib import Path

import pytest

from persona_probe.report.records import Records, load_records
from tests.report.run_records import write_run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def records(run_folder: Path) -> Records:
    return load_records(run_folder)
