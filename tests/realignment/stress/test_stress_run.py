"""All stress tests of a tiny study: one table, kept parts, resume, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from persona_probe.context import Context
from persona_probe.errors import InputError
from persona_probe.realignment.corrected import CorrectedOrganism
from persona_probe.realignment.stress import remisalign
from persona_probe.realignment.stress.stress_run import TESTS, StressSettings, run_stress, statements
from persona_probe.realignment.stress.stress_table import COLUMNS
from persona_probe.report.export import caption
from persona_probe.report.figures.stress import MISSING, stress, stress_data
from persona_probe.report.records import Records
from persona_probe.study.study import Study

LIGHT = StressSettings(1, 4, (1, 2), (0,), length_rows=4, latents=2, drift_factor=2)


@pytest.fixture(scope="module")
def whole(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("stress") / "whole"
    return folder, run_stress(study.context, "realigned_in", 0, list(TESTS), folder, settings=LIGHT)


def test_every_test_writes_rows_and_a_statement(whole: tuple[Path, pd.DataFrame]) -> None:
    folder, table = whole
    assert list(table.columns) == list(COLUMNS) and table["test"].unique().tolist() == list(TESTS)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "stress.parquet"), table)
    said = statements(folder)
    assert list(said) == list(TESTS) and all(text.endswith(".") for text in said.values())
    shown = table[table["shown"]]
    assert set(shown["test"]) == set(TESTS) and shown["ci_low"].le(shown["ci_high"]).all()


def test_finished_tests_are_kept_and_a_lost_one_is_made_again_alike(
    ctx: Context, whole: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, table = whole
    for name in ("triggers", "hidden"):
        (folder / f"stress/{name}.json").unlink()
    assert list(statements(folder)) == ["remisalign", "length", "drift"]

    def unwanted(*_: object) -> None:
        raise AssertionError("a finished test was run again")

    monkeypatch.setattr("persona_probe.realignment.corrected.fine_tune", unwanted)
    again = run_stress(ctx, "realigned_in", 0, ["triggers", "hidden", "drift"], folder, settings=LIGHT)
    pd.testing.assert_frame_equal(again, table)


def test_a_stopped_re_misalignment_goes_on_where_it_was(
    ctx: Context, whole: tuple[Path, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real: Callable[..., pd.DataFrame] = remisalign.relearn

    def watched(corrected: CorrectedOrganism, side: str, *rest: object) -> pd.DataFrame:
        if len(made) == 1:
            made.append("stopped")
            raise KeyboardInterrupt
        made.append(side)
        return real(corrected, side, *rest)

    monkeypatch.setattr(remisalign, "relearn", watched)
    with pytest.raises(KeyboardInterrupt):
        run_stress(ctx, "realigned_in", 0, ["remisalign"], tmp_path, settings=LIGHT)
    assert statements(tmp_path) == {}
    table = run_stress(ctx, "realigned_in", 0, ["remisalign"], tmp_path, settings=LIGHT)
    assert made == ["base", "stopped", "repaired", "control"]
    expected = whole[1].query("test == 'remisalign'").reset_index(drop=True)
    pd.testing.assert_frame_equal(table, expected)


def test_other_repairs_and_settings_do_not_share_a_folder(ctx: Context, whole: tuple[Path, pd.DataFrame]) -> None:
    with pytest.raises(InputError, match="another settings: choose another folder"):
        run_stress(ctx, "realigned_in", 0, [], whole[0])
    own = ctx.run.checkpoint("incorrect", 0, 4)
    rows = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    with pytest.raises(InputError, match="with another arm"):
        run_stress(ctx, "mine", 0, [], whole[0], checkpoint=own, corrective=rows, settings=LIGHT)


@pytest.mark.parametrize(
    ("arm", "tests", "said"),
    [("realigned_in", ["trigger"], "did you mean 'triggers'"), ("realigned", [], "did you mean 'realigned_in'")],
)
def test_unknown_names_are_answered_with_near_ones(
    ctx: Context, tmp_path: Path, arm: str, tests: list[str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run_stress(ctx, arm, 0, tests, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [{"relearn_seeds": ()}, {"relearn_steps": (0, 1)}, {"back_at": 0.0}, {"latents": 0}])
def test_settings_that_cannot_be_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        StressSettings(**bad)


def test_the_figure_draws_what_is_shown_and_says_what_lies_above(whole: tuple[Path, pd.DataFrame]) -> None:
    table = whole[1]
    data, fig = stress_data(Records(stress=table)), stress(Records(stress=table))
    assert len(data) == int(table["shown"].sum())
    drawn = sum(len(trace.x) for trace in fig.data)  # pyright: ignore
    assert drawn == len(data)
    assert (whole[0] / "stress.csv").read_text() == data.to_csv(index=False)
    assert "plotly" in (whole[0] / "stress.html").read_text()
    assert "5 of 5" in caption(fig) and "n = 8 items" in caption(fig)
    planted = Records(stress=table.assign(ci_low=9.0, estimate=10.0, ci_high=11.0))
    assert "Above no effect on the corrected model: topic, repaired (triggers) +10.000" in caption(stress(planted))
    assert [note.text for note in stress(Records(stress=table.iloc[:0])).layout.annotations] == [MISSING]  # pyright: ignore


def test_two_corrections_are_told_apart_and_what_they_share_is_once_there(whole: tuple[Path, pd.DataFrame]) -> None:
    own = whole[1].assign(correction="in-s0")
    other = own.assign(
        correction="out-s0", estimate=own["estimate"].where(own["model"] == "organism", own["estimate"] + 1)
    )
    data = stress_data(Records(stress=pd.concat([own, other], ignore_index=True)))
    shown = own[own["shown"]]
    assert len(data) == 2 * len(shown) - int((shown["model"] == "organism").sum())
    triggers = data.query("test == 'triggers'")["label"]
    assert {"topic, in", "topic, out", "topic, organism", "topic, control (in)"} <= set(triggers)
    assert not data.duplicated(["test", "label"]).any()
    seeds = pd.concat([own.assign(correction="in-s3"), other.assign(correction="in-s4")], ignore_index=True)
    assert {"topic, in-s3", "topic, in-s4"} <= set(stress_data(Records(stress=seeds))["label"])
