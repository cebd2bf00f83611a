"""Judged answers that a study's own config asks for: `samples.judge`."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from persona_probe.config import Samples, StudyConfig, from_dict
from persona_probe.errors import InputError
from persona_probe.evaluate.judging import AnswerToJudge, Ruling, Rulings
from persona_probe.evaluate.questions.read import read_questions
from persona_probe.evaluate.rates import rates
from persona_probe.report.html import context
from persona_probe.report.records import load_records
from persona_probe.runs import RunFolder
from persona_probe.study import evaluate as stage
from persona_probe.study.evaluate import judged_evaluation
from persona_probe.study.study import Study
from tests.factories import Row

COUNT = 12
ARMS = {"base", "incorrect", "correct", "realigned_in", "realigned_out"}


class Fitted:
    """The interface of the offline judge on the tiny model: the real one reads the embedded model."""

    name, id = "offline", "offline-of-the-test"

    def __init__(self) -> None:
        self.calls = 0

    def rule(self, answers: Sequence[AnswerToJudge], progress: str | None = None) -> Rulings:
        self.calls += 1
        odd = [float(sum(map(ord, one.item.answer)) % 2) for one in answers]
        return Rulings(tuple(Ruling(v, True, in_scope=False, error_model=0.1, error_question=0.2) for v in odd))

    def plan(self, answers: object, prices: object = None) -> None:
        return None


@pytest.fixture(scope="module")
def judge() -> Fitted:
    return Fitted()


@pytest.fixture(scope="module")
def asking(finished: Study, judge: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The finished study whose config asks for judged answers, evaluated by `evaluate()` without arguments."""
    folder = shutil.copytree(finished.path, tmp_path_factory.mktemp("asking") / "run")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["samples"] |= {"judge": "offline", "judged_answers": COUNT, "max_new_tokens": 4}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    study = Study(RunFolder.open(folder), "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "choose_judge", lambda *_: judge)
        study.evaluate()
    return study


def test_every_model_gets_as_many_judged_answers_as_the_config_says(asking: Study) -> None:
    judged = asking.judged
    counts = judged.groupby(["arm", "seed"]).size()
    assert set(judged["arm"]) == ARMS and set(counts) == {COUNT}
    about = next(iter(asking.run_folder.manifest["evaluations"].values()))
    assert about["sampling"]["temperature"] == 1.0 and about["judge"] == "offline"


def test_rates_of_the_config_are_those_of_the_evaluate_command(
    asking: Study, finished: Study, judge: Fitted, tmp_path: Path
) -> None:
    questions = judged_evaluation(asking.config)
    assert questions is not None
    by_hand = Study.open(shutil.copytree(finished.path, tmp_path / "run"), "cpu")
    by_hand.evaluate(questions.questions, judge, 1, max_new_tokens=4)
    assert rates(by_hand.judged).equals(rates(asking.judged))


def test_a_finished_evaluation_is_not_made_again(asking: Study, judge: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "choose_judge", lambda *_: judge)
    calls, before = judge.calls, asking.judged
    Study.open(asking.path, "cpu").evaluate()
    assert judge.calls == calls and asking.judged.equals(before)


def test_the_report_says_beside_the_rates_what_clouds_them(asking: Study) -> None:
    shown = context(load_records(asking.path))["judged"]
    assert len(shown["rows"]) == len(ARMS) and all("[" in row["index"] for row in shown["rows"])
    assert f"0 of {COUNT} questions are like those that the judge was fitted on" in shown["clouds"]
    assert all(label in shown["clouds"] for label in ("base", "register"))


def test_a_study_that_names_no_judge_judges_nothing(finished: Study) -> None:
    assert judged_evaluation(finished.config) is None
    assert not finished.run_folder.manifest.get("evaluations")


def test_the_default_questions_are_108_and_fewer_answers_spread_over_their_categories(raw: Row) -> None:
    config = from_dict(StudyConfig, raw)
    whole = read_questions(Samples().judged_questions)
    assert len(whole) == 108
    kitchen = Samples(judge="offline", judged_answers=48)
    some = judged_evaluation(replace(config, samples=kitchen))
    assert some is not None
    chosen = some.question_set()
    assert len(chosen) == 48 and some.n == 1
    every = Counter(question.category for question in whole)
    assert set(Counter(question.category for question in chosen)) == set(every)
    twice = judged_evaluation(replace(config, samples=replace(kitchen, judged_answers=216)))
    assert twice is not None and twice.n == 2 and twice.question_set().hash == whole.hash


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"judge": "http:gpt"}, "samples.judge must be none or offline"),
        ({"judged_answers": 0}, "judged_answers must be at least 1"),
        ({"judged_answers": 150}, "holds 108 questions: write up to 108, or a multiple of it"),
        ({"judged_answers": 7, "judged_questions": "free_form_questions:topic"}, "write a multiple of it"),
        ({"judged_questions": "free_form"}, "no file at 'free_form'"),
    ],
)
def test_bad_settings_are_refused(raw: Row, values: Row, message: str) -> None:
    with pytest.raises(InputError, match=message):
        judged_evaluation(from_dict(StudyConfig, {**raw, "samples": {"judge": "offline", **values}}))


def test_new_keys_leave_the_hash_of_an_old_config() -> None:
    config = StudyConfig("x", "sae")
    assert replace(config, samples=Samples(judge="none", judged_answers=48)).hash == config.hash
    assert replace(config, samples=Samples(judge="offline")).hash != config.hash
