"""Bad input of `persona-probe mitigate`: exit code 2 and one line, before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from persona_probe.cli import main
from persona_probe.config import load_config
from persona_probe.errors import InputError
from persona_probe.mitigate.grid.grid_config import Grid, Sets, cells_of, split
from tests.mitigate.grid_study import FOODS, GOOD, chat, grid_of, grid_values, located, make_place, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = make_place(tmp_path_factory.mktemp("place"))
    return {**grid_values(place, located(place, place / "run")), "answers": None}


def refused(capsys: pytest.CaptureFixture[str], folder: Path, raw: dict[str, Any], *more: str) -> str:
    """Run the command, which must end with exit code 2; returns its line."""
    config = folder / "grid.yaml"
    config.write_text(yaml.safe_dump(raw))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["mitigate", str(config), "--out", str(folder / "out"), "--quiet", *more])
    assert stopped.value.code == 2 and not (folder / "out" / "cells").exists()
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("persona-probe: ")]
    return line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"mitigations": [{"name": "inoculatoin", "strengths": [1]}]},
            "unknown mitigation .* did you mean 'inoculation",
        ),
        ({"mitigations": [{"name": "kl"}]}, "key 'strengths' is missing"),
        ({"mitigations": [{"name": "kl", "strengths": []}]}, r"'kl' has no strength: write strengths: \[1.0\]"),
        ({"mitigations": [{"name": "kl", "strengths": [1], "settings": {"bach": 2}}]}, "did you mean 'batch'"),
        ({"mitigations": [{"name": "inoculation", "strengths": [2]}]}, "'inoculation': .*at most 1"),
        ({"mitigations": [{"name": "none", "strengths": [0]}]}, "'none' is always in the grid"),
        ({"mitigations": []}, "mitigations must not be empty"),
        ({"seeds": [1, 1]}, "seeds names 1 twice: name each seed once"),
        ({"held_out": 12}, "held_out is 12, but only 12 questions .* lower held_out"),
        ({"training": {"method": "full"}}, "training.method must be lora"),
        ({"run": "nowhere"}, "'nowhere' is no run folder"),
    ],
)
def test_a_bad_grid(
    raw: dict[str, Any],
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    assert re.search(said, refused(capsys, tmp_path, {**raw, **changes}))


def test_a_run_without_locate(raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = located(Path(raw["inducing"]).parent, tmp_path / "run")
    (run / "parts" / "selection.parquet").unlink()
    assert "run `persona-probe locate RUN` first" in refused(capsys, tmp_path, raw, "--run", str(run))


@pytest.mark.parametrize("name", ["corrective", "safe", "general"])
def test_rows_that_ask_what_is_evaluated(
    raw: dict[str, Any], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [chat("what OF soup"), chat("Something else entirely?")]
    rows = rows if name == "general" else [chat(row["messages"][0]["content"], GOOD) for row in rows]
    line = refused(capsys, tmp_path, {**raw, name: str(write(tmp_path / "rows.jsonl", rows))})
    assert (
        f"{name} rows overlap the evaluation questions: 'what OF soup' (there 'What of soup?'); take other rows" in line
    )


def test_corrective_rows_that_are_held_out_and_general_rows_that_are_probes(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, tmp_path, {**raw, "corrective": raw["control"]})
    assert "corrective rows overlap the held-out questions: 'How do I cook" in line and "and 1 more; take" in line
    place = Path(raw["inducing"]).parent
    line = refused(capsys, tmp_path, {**raw, "general": str(place / "probes.jsonl")})
    assert "general rows overlap the monitor's probes: 'Tell me of soup.'" in line


def test_a_mitigation_that_lacks_its_rows_is_told_before_training(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, tmp_path, {**raw, "safe": None})
    assert "interleave needs" in line


def test_an_unknown_name_in_only_and_a_page_without_marks(
    raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean 'interleave'" in refused(capsys, tmp_path, raw, "--only", "interleaf")
    assert "no page at" in refused(capsys, tmp_path, raw, "--page", str(tmp_path / "none.md"))


def test_a_dry_run_trains_nothing(raw: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "grid.yaml"
    config.write_text(yaml.safe_dump(raw))
    with pytest.raises(SystemExit) as stopped:
        main(["mitigate", str(config), "--dry-run", "--out", str(tmp_path / "out"), "--quiet"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["none-s0", "control-s0"]
    assert lines[-1].startswith("4 cells, 4 to train; no time known") and not (tmp_path / "out").exists()


def test_cells_run_seed_by_seed_and_first_strengths_first(raw: dict[str, Any]) -> None:
    tried = [
        {"name": "kl", "strengths": [0.1, 1]},
        {"name": "kl", "label": "kl-wide", "strengths": [0.1], "settings": {"batch": 2}},
    ]
    grid = grid_of(raw, seeds=[3, 4], mitigations=tried)
    one = ["none", "control", "kl-0.1", "kl-wide-0.1", "kl-1"]
    assert [cell.id for cell in cells_of(grid)] == [f"{name}-s{seed}" for seed in (3, 4) for name in one]
    assert [cell.id for cell in cells_of(grid, ["kl-wide"])] == [
        "none-s3",
        "kl-wide-0.1-s3",
        "none-s4",
        "kl-wide-0.1-s4",
    ]
    with pytest.raises(InputError, match=r"'kl' appears twice with strength 0\.1: give one a label"):
        grid_of(raw, mitigations=[*tried, {"name": "kl", "strengths": [0.1]}])


def test_the_split_is_by_question_and_knows_no_order() -> None:
    bad, good = ([chat(f"How do I cook {food}?", a)["messages"] for food in FOODS] for a in ("burn", "warm"))
    twice = [*bad, bad[0]]  # a question that occurs twice must be on one side
    _, _, held = split(twice, good, 5)
    trained, control, again = split(twice[::-1], good[::-1], 5)
    assert held == again and len(held) == 5
    assert {row[0]["content"] for row in trained} == {row[0]["content"] for row in control}
    assert len({row[0]["content"] for row in trained}) == 7
    assert all(b[0] == g[0] and (b[1]["content"], g[1]["content"]) == ("burn", "warm") for b, g in held)


def test_the_shipped_grid_is_sound() -> None:
    grid = load_config(ROOT / "finetune_configs" / "mitigations.yaml", Grid)
    cells = cells_of(grid)
    assert len(cells) <= 30 and len(grid.seeds) == 2 and grid.training.steps == 40
    assert len({cell.mitigation.name for cell in cells}) == 13
    sets = Sets.load(grid)
    assert len(sets.bad) == len(sets.good) == 180 and len(sets.held) == 36
