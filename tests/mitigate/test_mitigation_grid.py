"""A tiny grid end to end: what it leaves, its identities, that it resumes, and that held-out rows stay out."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.evaluate.contrast import contrast_index
from persona_probe.mitigate.grid import grid_run as training
from persona_probe.mitigate.grid.grid_config import Grid, Sets, cells_of
from persona_probe.mitigate.grid.grid_context import GridContext
from persona_probe.mitigate.grid.grid_run import Outcome, run_grid
from persona_probe.mitigate.grid.grid_table import TIMES
from persona_probe.mitigate.grid.grid_verdict import WORDS
from persona_probe.units import make_units
from tests.factories import copied_state, hook_count, same_state
from tests.mitigate.grid_study import HELD_OUT, FakeJudge, grid_of, grid_values, located, make_place

CELLS = ["none-s0", "control-s0", "interleave-0.5-s0", "inference_steering-0.5-s0"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = make_place(tmp_path_factory.mktemp("place"))
    return grid_values(place, located(place, place / "run"))


@pytest.fixture(scope="module")
def grid(raw: dict[str, Any]) -> Grid:
    return grid_of(raw)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grid") / "out"


@pytest.fixture(scope="module")
def finished(grid: Grid, folder: Path) -> Outcome:
    """The whole grid, in `folder`; read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BROWSER_PATH", "/nowhere")
        return run_grid(grid, folder, judge=FakeJudge())


def over_seeds(outcome: Outcome) -> pd.DataFrame:
    return outcome.table[outcome.table["kind"] == "all"].set_index("label")


def number(outcome: Outcome, label: str, column: str) -> float:
    return float(over_seeds(outcome)[column].to_dict()[label])


def test_every_cell_has_a_row_and_so_has_every_mitigation(finished: Outcome) -> None:
    cells = finished.table[finished.table["kind"] == "cell"]
    assert cells["cell"].tolist() == ["base", *CELLS] and (cells["state"] == "done").all()
    assert list(over_seeds(finished).index) == ["base", "none", "control", "interleave", "inference_steering"]
    trained = over_seeds(finished).drop("base")
    assert (trained["steps"] == 4).all() and (trained["seconds_per_step"] > 0).all() and finished.missing == ()
    numbers = ["index", "dressed", "task", "persona", "perplexity_ratio", "gain_kept", "trigger_effect"]
    assert np.isfinite(trained[[f"{n}{end}" for n in numbers for end in ("", "_low", "_high")]].astype(float)).all(None)


def test_the_identities_of_the_references(finished: Outcome) -> None:
    rows = over_seeds(finished)
    for end in ("", "_low", "_high"):
        assert rows.loc["none", f"gain_kept{end}"] == 1.0 and rows.loc["base", f"gain_kept{end}"] == 0.0
        assert rows.loc["control", f"index_vs_control{end}"] == 0.0
        assert rows.loc["control", f"effect_left{end}"] == 0.0
        assert rows.loc["none", f"effect_left{end}"] == 1.0
        assert rows.loc["none", f"index_vs_none{end}"] == 0.0 and rows.loc["base", f"index_vs_base{end}"] == 0.0
        assert rows.loc["base", f"perplexity_ratio{end}"] == 1.0 and rows.loc["base", f"trigger_effect{end}"] == 0.0
    assert rows.loc["none", "time_ratio"] == 1.0
    assert bool(rows.loc["base", "persona_in_band"])
    assert number(finished, "none", "index_vs_base_low") > 0 > number(finished, "control", "index_vs_base_high")
    assert number(finished, "control", "gain_kept") < 0


def test_a_mitigation_that_acts_at_inference_is_measured_with_it(finished: Outcome, folder: Path) -> None:
    # The same training as none's, bit for bit: all that differs is the push.
    steered, none = (json.loads((folder / "cells" / c / "cell.json").read_text()) for c in (CELLS[3], CELLS[0]))
    assert steered["losses"] == none["losses"]
    plain = number(finished, "none", "index")
    assert plain != number(finished, "inference_steering", "index") and plain != number(finished, "interleave", "index")


def test_the_base_is_measured_as_the_study_measures_it(finished: Outcome, grid: Grid, folder: Path) -> None:
    context = GridContext(grid, folder, judge=FakeJudge())
    index = contrast_index(context.study.model, context.plain, bf16=False)["value"]
    assert over_seeds(finished).loc["base", "index"] == pytest.approx(index.mean(), abs=1e-6)
    task = contrast_index(context.study.model, context.task, bf16=False)
    assert len(task) == HELD_OUT
    assert over_seeds(finished).loc["base", "task"] == pytest.approx(task["value"].mean(), abs=1e-6)


def test_every_training_was_watched(finished: Outcome, folder: Path) -> None:
    for cell in CELLS:
        events = [json.loads(line) for line in (folder / "cells" / cell / "monitor.jsonl").read_text().splitlines()]
        assert {event["step"] for event in events if event["event"] == "reading"} == {0, 2, 4}


def test_answers_are_sampled_and_judged(finished: Outcome, folder: Path) -> None:
    answers = pd.read_parquet(folder / "answers.parquet")
    assert answers.groupby("cell").size().to_dict() == dict.fromkeys(["base", *CELLS], 6)
    assert set(answers.loc[answers["steered"], "cell"]) == {"inference_steering-0.5-s0"}
    rows = over_seeds(finished)
    assert (rows["coherent"] == 1).all() and (rows["misaligned"] == 0.5).all() and (rows["coherence"] == 80).all()


def test_verdicts_and_files(finished: Outcome, folder: Path) -> None:
    verdicts = json.loads((folder / "summary.json").read_text())["verdicts"]
    assert [v["label"] for v in verdicts] == ["interleave", "inference_steering"]
    assert {v["verdict"] for v in verdicts} <= set(WORDS) and all("contrast index" in v["statement"] for v in verdicts)
    again = pd.read_parquet(folder / "mitigations.parquet")
    assert again["verdict"].tolist() == finished.table["verdict"].tolist()
    assert len(pd.read_csv(folder / "mitigations.csv")) == len(again)
    assert {p.name for p in (folder / "figures").iterdir()} >= {"mitigation_pareto.html", "mitigation_pareto.csv"}
    # 6 items plain, 6 dressed, 4 held out, 6 neutral answers, 6 probes, for base and four cells
    assert len(pd.read_parquet(folder / "items.parquet")) == 5 * 28


def test_a_deleted_cell_comes_back_the_same(
    finished: Outcome, grid: Grid, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    copy = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(copy / "cells" / CELLS[2])
    (copy / ".staging" / "cells--half").mkdir(parents=True)  # what a killed run leaves
    kept = (copy / "cells" / CELLS[1] / "items.parquet").stat().st_mtime_ns
    again = run_grid(grid, copy, judge=FakeJudge())
    assert (copy / "cells" / CELLS[1] / "items.parquet").stat().st_mtime_ns == kept
    times = list(TIMES)
    pd.testing.assert_frame_equal(again.table.drop(columns=times), finished.table.drop(columns=times))


def test_held_out_rows_are_never_trained_on_and_divergence_is_a_result(
    raw: dict[str, Any], grid: Grid, finished: Outcome, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/nowhere")
    seen: list[list[Any]] = []

    def diverging(tuned: object, inputs: object, rows: Sequence[Any], *rest: object, **named: object) -> None:
        seen.append(list(rows))
        raise TrainingDiverged("the loss became nan at step 1")

    copy = shutil.copytree(folder, tmp_path / "again")
    for cell in CELLS[1:]:
        shutil.rmtree(copy / "cells" / cell)
    monkeypatch.setattr(training, "train_mitigated", diverging)
    outcome = run_grid(grid, copy, judge=FakeJudge())
    held = {pair[0][0]["content"] for pair in Sets.load(grid).held}
    assert len(held) == HELD_OUT and len(seen) == 3
    for rows in seen:
        asked = {row[0]["content"] for row in rows}
        assert len(asked) == 12 - HELD_OUT and not asked & held
    rows = over_seeds(outcome)
    assert rows.loc["interleave", "verdict"] == "diverged" and rows.loc["interleave", "state"] == "diverged"
    assert np.isnan(number(outcome, "interleave", "index")) and rows.loc["none", "gain_kept"] == 1.0
    statements = [v["statement"] for v in outcome.summary["verdicts"]]
    assert "the loss became nan" in statements[0]


def test_the_study_and_its_model_are_left_as_they_were(grid: Grid, raw: dict[str, Any], tmp_path: Path) -> None:
    context = GridContext(grid, tmp_path / "grid", judge=FakeJudge())
    before = copied_state(context.study.model)
    run = Path(raw["run"])
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    make_units(context, training.base_units)
    make_units(context, partial(training.cell_units, cells_of(grid)[:1]))
    assert same_state(copied_state(context.study.model), before) and hook_count(context.study.model) == 0
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == files


def test_a_changed_config_is_refused(finished: Outcome, raw: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    changed = grid_of(raw, held_out=5)
    with pytest.raises(InputError, match="holds a grid of mitigations with other settings: choose another --out"):
        run_grid(changed, folder, judge=FakeJudge())
    other = grid_of(raw, mitigations=[{"name": "interleave_perplexity", "label": "interleave", "strengths": [0.5]}])
    with pytest.raises(InputError, match=r"interleave-0\.5-s0 was made with other settings"):
        run_grid(other, folder, judge=FakeJudge())
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "file").touch()
    with pytest.raises(InputError, match="is no grid of mitigations"):
        run_grid(grid_of(raw), tmp_path / "thing", judge=FakeJudge())


def test_a_grid_may_grow(finished: Outcome, raw: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "again")
    more = grid_of(raw, seeds=[0, 1], mitigations=[*raw["mitigations"], {"name": "kl", "strengths": [0.1]}])
    GridContext(more, copy, judge=FakeJudge())
    ids = [cell.id for cell in cells_of(more)]
    assert ids[: len(CELLS) + 1] == [*CELLS, "kl-0.1-s0"] and ids[len(CELLS) + 1] == "none-s1"
