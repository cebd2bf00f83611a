"""`persona-probe data screen`: on a tiny model, and one line for bad input (a study screens in tests/study)."""

import json
from pathlib import Path

import pandas as pd
import pytest

from persona_probe.cli import main
from tests.factories import Row, talks, write_lines, write_model, write_sae


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, SAE and a file of rows; read only."""
    folder = tmp_path_factory.mktemp("screen")
    write_model(folder / "model")
    write_sae(folder / "sae")
    rows: list[Row] = [{"messages": talk} for talk in talks(5)]
    write_lines(folder / "rows.jsonl", rows)
    return folder


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "screen", *map(str, arguments)])
    assert stopped.value.code == 0


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["data", "screen", *map(str, arguments)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("persona-probe: ")
    return error


def test_a_file_is_screened_by_a_latent(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    given = ("--model", place / "model", "--sae", place / "sae", "--latent", 5, "--device", "cpu", "--worst", 2)
    run(place / "rows.jsonl", *given, "--rankers", "latent", "projection_difference", "--out", out)
    frame = pd.read_parquet(out / "screen.parquet")
    assert len(frame) == 5 and frame["latent"].is_monotonic_decreasing
    said = capsys.readouterr().out
    assert "5 rows, worst first by latent" in said and "no prediction: no calibration" in said
    assert f"page: {out / 'screen.html'}" in said
    before = (out / "own_answers.jsonl").read_bytes()
    run(place / "rows.jsonl", *given, "--out", out)  # goes on with the answers that are there
    assert (out / "own_answers.jsonl").read_bytes() == before


def test_bad_input(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, empty, asked = place / "rows.jsonl", tmp_path / "empty.jsonl", tmp_path / "asked.jsonl"
    empty.touch()
    asked.write_text(json.dumps({"messages": [{"role": "user", "content": "Only asked?"}]}) + "\n")
    given = ("--model", place / "model", "--sae", place / "sae", "--device", "cpu", "--out", tmp_path / "out")
    assert "no rows" in told(capsys, empty, *given, "--latent", 5)
    assert "without an assistant answer" in told(capsys, asked, *given, "--latent", 5)
    assert "no data at" in told(capsys, tmp_path / "none.jsonl", *given, "--latent", 5)
    assert "latent 64 does not exist" in told(capsys, rows, *given, "--latent", 64)
    assert "no persona feature" in told(capsys, rows)
    assert "--worst must be at least 1" in told(capsys, rows, *given, "--latent", 5, "--worst", 0)
    assert "unknown ranker" in told(capsys, rows, *given, "--latent", 5, "--rankers", "latnt")
    assert "needs an organism" in told(capsys, rows, *given, "--latent", 5, "--rankers", "perplexity_gap_organism")
    assert "leave --model" in told(capsys, rows, *given, "--run", tmp_path)
    assert "--direction names one of a run's" in told(capsys, rows, *given, "--latent", 5, "--direction", "x")
    assert not (tmp_path / "out").exists()
