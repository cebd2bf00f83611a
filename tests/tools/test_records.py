"""Records: a planted table is packed with the manifest that its command wrote."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.latents.planted.planted_run import MODEL, SAE, PlantedSettings
from persona_probe.report.records import load_records
from tests.factories import run_command
from tools.records import PLANTED, judge, main, pack

SHIPPED = Path(__file__).parents[2] / "records" / "planted"


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `bench planted --out` leaves, with the shipped table in the place of a measurement."""
    measured: list[PlantedSettings] = []

    def run_embedded(settings: PlantedSettings, device: str, progress: bool) -> pd.DataFrame:
        measured.append(settings)
        return pd.read_parquet(SHIPPED / "planted.parquet")

    monkeypatch.setattr("persona_probe.latents.planted.planted_run.run_embedded", run_embedded)
    run_command("bench", "planted", "--plants", 30, "--seed", 4, "--out", tmp_path / "mine.parquet")
    assert measured == [PlantedSettings(plants=30, seed=4)]
    return tmp_path / "mine.parquet"


def test_bench_planted_writes_a_manifest_next_to_its_table(table: Path) -> None:
    manifest = json.loads(table.with_name("mine.manifest.json").read_text())
    assert manifest["kind"] == "planted" and manifest["seeds"] == [4]
    assert manifest["config"] == {"name": "planted", "model": MODEL, "sae": SAE}
    assert manifest["settings"]["plants"] == 30 and manifest["plants"] == PlantedSettings(plants=30).count()
    assert {"torch", "persona-probe"} <= set(manifest["versions"]) and "git_revision" in manifest


def test_a_planted_table_is_packed_with_its_manifest(table: Path, tmp_path: Path) -> None:
    pack(table, tmp_path / "record")
    packed = tmp_path / "record" / "manifest.json"
    assert packed.read_bytes() == table.with_name("mine.manifest.json").read_bytes()
    figure = (tmp_path / "record" / "figures" / "planted_truth.csv").read_bytes()
    assert figure == (SHIPPED / "figures" / "planted_truth.csv").read_bytes()
    assert load_records(tmp_path / "record").manifest["seeds"] == [4]


def test_a_planted_table_of_version_0_1_0_is_packed_as_it_was(tmp_path: Path) -> None:
    table = Path(shutil.copyfile(SHIPPED / "planted.parquet", tmp_path / "planted.parquet"))
    for path in pack(table, tmp_path / "record"):
        if path.name == "manifest.json":  # the shipped table was made by 0.2.0, which writes one itself
            assert json.loads(path.read_text()) == PLANTED
        else:
            assert path.read_bytes() == (SHIPPED / path.relative_to(tmp_path / "record")).read_bytes(), path


GRID = SHIPPED.parent / "mitigations"


def test_a_grid_is_judged_again_from_its_record_and_the_shipped_one_was(tmp_path: Path) -> None:
    record = Path(shutil.copytree(GRID, tmp_path / "grid"))
    page = tmp_path / "page.md"
    page.write_text("<!-- mitigations: begin -->\n<!-- mitigations: end -->\n")
    table = pd.read_parquet(record / "mitigations.parquet")
    words = ["behaviour", "dressed_behaviour", "feature", "task_kept", "chat_kept", "sae", "verdict"]
    table.drop(columns=words).to_parquet(record / "mitigations.parquet")
    assert main(["judge", str(record), str(page)]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(record / "mitigations.parquet")[table.columns], table)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (record, GRID)]
    assert summaries[0] == summaries[1]
    shipped_page = (SHIPPED.parents[1] / "docs" / "mitigations.md").read_text()
    assert page.read_text() in shipped_page


def test_a_grid_is_judged_with_its_own_study_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the study of"):
        judge(GRID, SHIPPED.parent / "mitigations")
    with pytest.raises(InputError, match=r"holds no mitigations\.parquet"):
        judge(SHIPPED, SHIPPED.parent / "demo")
    assert main(["judge", str(GRID)]) == 2
