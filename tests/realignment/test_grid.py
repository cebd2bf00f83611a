"""A grid of corrections: order, resume at every cell's end, one table, and its figure."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from persona_probe.config import StudyConfig, load_config
from persona_probe.errors import InputError, TrainingDiverged
from persona_probe.realignment import correct as correcting
from persona_probe.realignment import correct as grid
from persona_probe.realignment.spec import Block, DosePlan
from persona_probe.report.export import write_figure
from persona_probe.report.figures.doses import MISSING, doses, doses_data
from persona_probe.report.records import Records
from persona_probe.study.study import Study

ROOT = Path(__file__).parents[2]


def plan_of(place: Path, **changes: Any) -> DosePlan:
    """Three cells: two doses, and one of them chosen otherwise."""
    data = str(place / "holdout.jsonl")
    blocks = (Block((data,), (4, 8)), Block((data,), (4,), ("random", "perplexity_gap")))
    return DosePlan(**{"name": "tiny", "blocks": blocks, "readings": (0, 2), **changes})


@pytest.fixture(scope="module")
def unbroken(tracked: Study, place: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study.open(shutil.copytree(tracked.path, tmp_path_factory.mktemp("grid") / "run"))
    study.realign_plan(plan_of(place))
    return study


def test_the_table_has_a_row_for_each_cell_in_order(unbroken: Study) -> None:
    table = pd.read_parquet(unbroken.path / "realign/doses.parquet")
    assert table[["dose", "choose_by"]].to_numpy().tolist() == [[4, "random"], [8, "random"], [4, "perplexity_gap"]]
    assert table["rows"].tolist() == [4, 8, 4]
    assert (table["steps"] == 2).all() and not table["diverged"].any()
    assert (table["index_minus_base_ci_low"] <= table["index_minus_base"]).all()
    assert table["start_minus_base"].nunique() == 1  # one organism
    inside = table["feature"].between(table["band_low"], table["band_high"])
    assert inside.tolist() == table["in_band"].tolist()
    assert (table["steps_to_band"].notna() == table["in_band"]).all()
    assert (table["perplexity_ratio"] > 0).all() and (table["reply_tokens"] >= 0).all()


class Killed(BaseException):
    """Stands for a signal."""


def test_a_grid_stopped_at_every_cell_ends_as_an_unbroken_one(
    tracked: Study, unbroken: Study, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.open(shutil.copytree(tracked.path, tmp_path / "run"))
    whole, write = correcting.correct, correcting._write_outcome
    trained: list[str] = []

    def once(bench: Any, correction: Any, seed: int, name: str) -> None:
        there = (study.path / f"realign/{name}-s{seed}").exists()
        whole(bench, correction, seed, name)
        if not there:
            trained.append(name)
            raise Killed

    def never(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(grid, "correct", once)
    monkeypatch.setattr(correcting, "_write_outcome", never)
    with pytest.raises(Killed):  # inside the first cell, after its training
        study.realign_plan(plan_of(place))
    assert not list((study.path / "realign").glob("*")) if (study.path / "realign").exists() else True
    monkeypatch.setattr(correcting, "_write_outcome", write)
    for _ in range(3):
        with pytest.raises(Killed):
            study.realign_plan(plan_of(place))
    table = study.realign_plan(plan_of(place))
    assert len(set(trained)) == len(trained) == 3
    pd.testing.assert_frame_equal(table, pd.read_parquet(unbroken.path / "realign/doses.parquet"))


def test_a_cell_that_diverges_is_recorded(
    tracked: Study, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.open(shutil.copytree(tracked.path, tmp_path / "run"))
    calls: list[str] = []

    def diverge(_tuned: Any, run: Any, *_: Any) -> None:
        calls.append(run.progress)
        raise TrainingDiverged("the loss became nan")

    monkeypatch.setattr(correcting, "train_watched", diverge)
    for _ in range(2):
        table = study.realign_plan(plan_of(place))
        assert table["diverged"].tolist() == [True] * 3
    assert len(calls) == 3
    assert doses(Records(doses=table)).layout.meta["caption"] == MISSING  # pyright: ignore


def test_the_figure_draws_the_cells_and_says_their_number(unbroken: Study) -> None:
    table = pd.read_parquet(unbroken.path / "realign/doses.parquet")
    records = Records(doses=table)
    data = doses_data(records)
    fig: Any = doses(records)
    assert len(data) == 3
    drawn = [float(y) for trace in fig.data if trace.mode == "markers" and trace.x[0] is not None for y in trace.y]
    wanted = [*table["index_minus_base"], *table["feature"], *table["explained_variance"]]
    assert sorted(drawn) == pytest.approx(sorted(wanted))
    caption = fig.layout.meta["caption"]  # pyright: ignore
    assert "n = 3 cells, 1 seed" in caption
    assert {"random", "perplexity gap"} <= {trace.name for trace in fig.data}
    assert f"control arm and base, in {int(table['behaviour_back'].sum())} cells" in caption
    page = write_figure(unbroken.path / "realign", "doses", records)
    assert caption.split(".")[0] in page.read_text()
    assert len(pd.read_csv(page.with_suffix(".csv"))) == 3


def test_the_packaged_plan_fits_the_demo() -> None:
    plan = load_config(ROOT / "finetune_configs/realign-doses.yaml", DosePlan)
    cells = plan.cells(load_config(ROOT / "finetune_configs/demo.yaml", StudyConfig))
    doses_of = {(c.data, c.choose_by, c.method): set[int | None]() for _, _, c in cells}
    for _, _, c in cells:
        doses_of[c.data, c.choose_by, c.method].add(c.rows)
    plain = {4, 8, 20, 40, 80, 120}
    assert doses_of[("kitchen_correct_holdout",), "random", "continued"] == plain
    assert doses_of[("health_correct",), "random", "continued"] == plain
    assert doses_of[("kitchen_correct_holdout", "health_correct"), "random", "continued"] == {140, 240}
    assert doses_of[("kitchen_correct_holdout",), "diversity", "continued"] == {8, 40}
    assert len({name for _, name, _ in cells}) == len(cells) == 22


def test_bad_plans_say_what_to_change(place: Path, tracked: Study) -> None:
    with pytest.raises(InputError, match="no seed 5"):
        plan_of(place, seeds=(5,)).cells(tracked.config)
    with pytest.raises(InputError, match="unknown choice"):
        Block(("a",), (4,), ("best",))
    with pytest.raises(InputError, match="needs blocks"):
        DosePlan("x", ())
    with pytest.raises(InputError, match="two cells are called"):
        plan_of(place, blocks=(Block(("a",), (4,)), Block(("a",), (4,), lr=1.0))).cells(tracked.config)
    with pytest.raises(InputError, match="77 corrective rows wanted"):
        tracked.realign_plan(plan_of(place, blocks=(Block((str(place / "holdout.jsonl"),), (4, 77)),)))
    assert not (tracked.path / "realign").exists()
