"""Judged trajectories: the rate at any step, written checkpoint by checkpoint, drawn and kept in the records."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from persona_probe.errors import InputError
from persona_probe.evaluate.judging import AnswerToJudge, Ruling, Rulings
from persona_probe.evaluate.questions.question_set import QuestionSet
from persona_probe.evaluate.questions.read import read_questions
from persona_probe.evaluate.rates import rates
from persona_probe.report import figures
from persona_probe.report.records import load_records
from persona_probe.study.study import Study
from tests.factories import Refused

N, TOKENS = 2, 5
ARMS = ("incorrect", "correct")


class Counting:
    """A judge that calls answers of an odd sum of characters misaligned, and counts what it ruled on."""

    name, id = "odd", "odd-1"

    def __init__(self, limit: int | None = None) -> None:
        self.calls, self.limit = 0, limit

    def rule(self, answers: Sequence[AnswerToJudge], progress: str | None = None) -> Rulings:
        if self.limit is not None and self.calls >= self.limit:
            raise KeyboardInterrupt
        self.calls += 1
        return Rulings(tuple(Ruling(float(sum(map(ord, one.item.answer)) % 2), True) for one in answers))

    def plan(self, answers: object, prices: object = None) -> None:
        return None


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> QuestionSet:
    path = tmp_path_factory.mktemp("questions") / "set.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{n}", "question": f"What of {n}?"}) + "\n" for n in range(6)))
    return read_questions(path)


@pytest.fixture(scope="module")
def judged(finished: Study, questions: QuestionSet, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The finished study (steps 1, 2 and 4 of two arms and seeds) with all its checkpoints judged; read only."""
    study = Study.open(shutil.copytree(finished.path, tmp_path_factory.mktemp("judged") / "run"), "cpu")
    return study.evaluate(questions, Counting(), N, max_new_tokens=TOKENS, steps="all")


def test_every_checkpoint_has_a_rate_with_its_interval(judged: Study) -> None:
    table = judged.judged_steps
    assert len(table) == 1 + 2 * 2 * 3 + 4 and set(table["answers"]) == {6 * N}  # base, arms x seeds x steps, realigned
    steps = table[table["arm"].isin(ARMS)].groupby(["arm", "seed"])["step"]
    assert [sorted(own) for _, own in steps] == [[1, 2, 4]] * 4
    assert ((table["ci_low"] <= table["rate"]) & (table["rate"] <= table["ci_high"])).all()
    last = rates(judged.judged, ("arm", "seed", "step")).set_index(["arm", "seed", "step"])["rate"]
    pd.testing.assert_series_equal(table.set_index(["arm", "seed", "step"])["rate"].reindex(last.index), last)


def test_the_end_is_judged_as_without_a_trajectory(
    judged: Study, finished: Study, questions: QuestionSet, tmp_path: Path
) -> None:
    study = Study.open(shutil.copytree(finished.path, tmp_path / "run"), "cpu")
    study.evaluate(questions, Counting(), N, max_new_tokens=TOKENS)
    pd.testing.assert_frame_equal(study.judged, judged.judged)
    assert not (study.path / "judged_steps.parquet").exists()
    assert figures.data("judged_trajectory", load_records(study.path)).empty


def test_a_stop_loses_one_checkpoint_at_most(
    judged: Study, finished: Study, questions: QuestionSet, tmp_path: Path
) -> None:
    study = Study.open(shutil.copytree(finished.path, tmp_path / "run"), "cpu")
    ends = 1 + 4 + 4  # base, two arms and two corrective arms of two seeds
    with pytest.raises(KeyboardInterrupt):
        study.evaluate(questions, Counting(ends + 3), N, max_new_tokens=TOKENS, steps="all")
    assert len(study.judged_steps) == ends + 3
    judge = Counting()
    study.evaluate(questions, judge, N, max_new_tokens=TOKENS, steps="all")
    assert judge.calls == ends + 8 - 3
    key = ["arm", "seed", "step"]
    broken, whole = (one.judged_steps.sort_values(key, ignore_index=True) for one in (study, judged))
    pd.testing.assert_frame_equal(broken, whole)


def test_chosen_steps_only(finished: Study, questions: QuestionSet, tmp_path: Path, refused: Refused) -> None:
    study = Study.open(shutil.copytree(finished.path, tmp_path / "run"), "cpu")
    study.evaluate(questions, Counting(), N, max_new_tokens=TOKENS, steps=[2])
    table = study.judged_steps
    assert set(table.loc[table["arm"].isin(ARMS), "step"]) == {2, 4}
    with pytest.raises(InputError, match=r"no arm has a checkpoint at step 3: there are \[1, 2, 4\]"):
        study.evaluate(questions, Counting(), N, steps=[3])
    with pytest.raises(InputError, match="steps of a trajectory are judged: name a judge"):
        study.evaluate(questions, steps="all")
    run = study.path
    assert "write all, or numbers" in refused("evaluate", run, "--judge", "offline", "--steps", "some")
    assert "name a judge" in refused("evaluate", run, "--questions", "sample_questions", "--steps", "all")


def test_the_report_draws_it_and_the_records_keep_it(judged: Study) -> None:
    records = load_records(judged.path)
    data = figures.data("judged_trajectory", records)
    assert sorted(set(data["step"])) == [0, 1, 2, 4] and set(data["arm"]) == set(ARMS)
    base = records.judged_steps.query("arm == 'base'")["rate"].iloc[0]
    assert (data.loc[data["step"] == 0, "rate"] == base).all() and len(data) == 16
    fig = figures.judged_trajectory(records)
    assert "95% intervals" in fig.layout.meta["caption"] and len(fig.data) == 8
    from tools.records import FILES

    assert "judged_steps.parquet" in FILES
