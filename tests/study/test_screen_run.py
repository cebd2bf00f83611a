"""`study.screen` and `persona-probe data screen --run`: a study's own feature, directions and organism."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from persona_probe.cli import main
from persona_probe.study.study import Study
from tests.factories import Refused


def test_a_study_screens_with_its_own_feature_and_organism(
    finished: Study, place: Path, tmp_path: Path, refused: Refused
) -> None:
    bad, before = place / "bad.jsonl", sorted(finished.path.rglob("*"))
    frame, turned = finished.screen(bad), finished.screen(bad, direction="mean_difference")
    assert {"latent_difference", "perplexity_gap_organism", "projection_difference"} <= set(frame)
    one, other = (f.set_index("row").sort_index() for f in (frame, turned))
    assert one["latent"].equals(other["latent"])
    assert not one["projection_difference"].equals(other["projection_difference"])
    assert sorted(finished.path.rglob("*")) == before  # the run itself is left alone
    with pytest.raises(SystemExit) as stopped:
        given = ("--run", finished.path, "--rankers", "perplexity_gap_organism", "--out", tmp_path / "out")
        main(["data", "screen", *map(str, (bad, *given))])
    assert stopped.value.code == 0
    written = pd.read_parquet(tmp_path / "out" / "screen.parquet").set_index("row").sort_index()
    pd.testing.assert_series_equal(written["perplexity_gap_organism"], one["perplexity_gap_organism"])
    assert "unknown direction" in refused("data", "screen", bad, "--run", finished.path, "--direction", "mean_dif")


def test_a_study_that_located_nothing_cannot_screen(
    finished: Study, place: Path, tmp_path: Path, refused: Refused
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    (run / "directions.safetensors").unlink()
    told = refused("data", "screen", place / "bad.jsonl", "--run", run, "--out", tmp_path / "out")
    assert "run `persona-probe locate RUN` first" in told
    assert not (tmp_path / "out").exists()
