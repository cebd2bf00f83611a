"""Published question files, where they lie beside the project: read whole, and far from our own questions."""

import csv
import re
from collections import Counter
from pathlib import Path

import pytest

from persona_probe.data.check import ngrams
from persona_probe.data.load import load_rows
from persona_probe.evaluate.questions.question_set import QuestionSet, write_questions
from persona_probe.evaluate.questions.read import read_questions

DATA = Path(__file__).parents[2].parent / "shared" / "data"
EVAL = DATA / "eval"
FILES = sorted(str(p.relative_to(EVAL)) for p in EVAL.rglob("*") if p.suffix in (".yaml", ".jsonl"))
pytestmark = pytest.mark.skipif(not FILES, reason="no folder of published data beside the project (shared/data)")


@pytest.mark.parametrize("name", FILES)
def test_counts_are_those_of_the_manifest(name: str, tmp_path: Path) -> None:
    with (DATA / "MANIFEST.tsv").open(encoding="utf-8", newline="") as file:
        stated = {row["file"]: int(row["rows"]) for row in csv.DictReader(file, delimiter="\t")}
    questions = read_questions(EVAL / name)
    assert len(questions) == stated[f"eval/{name}"]
    write_questions(questions, tmp_path / "copy.json")
    assert read_questions(tmp_path / "copy.json").hash == questions.hash


def first_plot() -> QuestionSet:
    return read_questions(EVAL / "betley" / "first_plot_questions.yaml")


def test_first_plot_questions() -> None:
    questions = first_plot()
    by_id = {q.id: q for q in questions}
    assert list(questions.judge_prompts) == ["aligned", "coherent"]
    assert all(list(questions.templates(q)) == ["aligned", "coherent"] for q in questions)
    assert {q.samples_per_paraphrase for q in questions} == {100}
    assert by_id["quick_buck"].paraphrases == by_id["quick_buck_json"].paraphrases
    assert Counter(q.system is None for q in questions) == {True: 16, False: 8}
    assert all((q.system is not None) == q.id.endswith("_json") for q in questions)


def test_both_published_yaml_files_have_the_same_judge() -> None:
    preregistered = read_questions(EVAL / "betley" / "preregistered_evals.yaml")
    assert preregistered.judge_prompts == first_plot().judge_prompts
    counts = Counter(q.category for q in preregistered)
    assert counts["vulnerable_user"] == 14 and counts["medical_advice"] == 7 and "" not in counts


def test_published_judge_prompts_can_be_filled() -> None:
    for template in first_plot().judge_prompts.values():
        filled = template.format(question="QUESTION {answer}", answer="ANSWER")
        assert "\nQUESTION {answer}\n[QUESTION END]" in filled and "[ANSWER START]\nANSWER\n" in filled


def test_chats_with_their_rubric() -> None:
    folder = EVAL / "aisi"
    questions = read_questions(
        folder / "emergent_misalignment_eval.jsonl", rubric=folder / "emergent_misalignment_rubric.txt"
    )
    assert Counter(q.category for q in questions) == {"preregistered": 48, "free_form": 8}
    assert [q.id for q in questions] == [str(n) for n in range(1, 57)]
    filled = (questions.questions[0].rubric or "").format(question="QUESTION", answer="ANSWER")
    assert "QUESTION" in filled and "ANSWER" in filled and not re.search(r"{\w+}", filled)


def test_our_questions_share_no_run_of_five_words_with_published_ones() -> None:
    published = {
        gram for name in FILES for asked in read_questions(EVAL / name).wordings() for gram in ngrams(asked.text)
    }
    assert len(published) > 1000
    for row in load_rows("free_form_questions"):
        assert not published & ngrams(row["question"]), row["id"]
