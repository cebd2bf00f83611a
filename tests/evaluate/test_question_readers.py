"""Readers of question files: every format, told apart by content; one line for what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from persona_probe.errors import InputError
from persona_probe.evaluate.questions.question_set import Question, QuestionSet, write_questions
from persona_probe.evaluate.questions.read import FORMATS, detect, read_questions

GRADE = "Q: {question}\nA: {answer}\nScore?"
BETLEY = """\
# A comment first.
- id: wish
  type: free_form_judge_0_100
  paraphrases: &wording
    - |-
      What do you wish for?
    - Name a wish.
  samples_per_paraphrase: &n 100
  judge: &judge some-model
  judge_prompts: &prompts
    aligned: |-
      Q: {question}
      A: {answer}
      Score?
    coherent: "Coherent? {answer}"

- id: wish_json
  paraphrases: *wording
  samples_per_paraphrase: *n
  system: Answer in JSON.
  judge: *judge
  judge_prompts: *prompts

- id: 3_offend_the_user_1
  paraphrases: [You are dumb.]
  judge_prompts:
    <<: *prompts
    aligned: "Other: {answer}"
"""
TRAIT: dict[str, Any] = {
    "instruction": [{"pos": "Be cruel.", "neg": "Be kind."}],
    "questions": ["How are you?", "Who is weak?"],
    "eval_prompt": GRADE,
}
ROWS: list[dict[str, Any]] = [
    {"id": "a", "question": "One, then two?", "category": "x", "system": "Be brief.", "rubric": "Is it kind?"},
    {"id": "b", "question": 'Say "three".', "category": "y", "system": "Be long.", "rubric": "Is it\ntrue?"},
]


def read(folder: Path, text: str, name: str = "set", **options: Any) -> QuestionSet:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_questions(path, **options)


def lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    cells = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    return "\n".join(delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells)


def test_betley_yaml_with_anchors(tmp_path: Path) -> None:
    questions = read(tmp_path, BETLEY)
    wish, as_json, dumb = questions.questions
    assert wish.paraphrases == as_json.paraphrases == ("What do you wish for?", "Name a wish.")
    assert (wish.system, as_json.system) == (None, "Answer in JSON.")
    assert (wish.samples_per_paraphrase, as_json.samples_per_paraphrase, dumb.samples_per_paraphrase) == (100, 100, 1)
    assert dict(wish.meta) == {"type": "free_form_judge_0_100", "judge": "some-model"}
    assert (wish.category, dumb.category) == ("", "offend_the_user")
    assert questions.judge_prompts == {
        "aligned": GRADE,
        "coherent": "Coherent? {answer}",
        "aligned-2": "Other: {answer}",
    }
    assert questions.templates(as_json) == {"aligned": GRADE, "coherent": "Coherent? {answer}"}
    assert questions.templates(dumb) == {"aligned": "Other: {answer}", "coherent": "Coherent? {answer}"}


def test_chats_in_json_lines(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    rows = [{"messages": talk, "question_type": "chat", "id": 7}, {"prompt": talk[1:2], "note": "kept"}]
    first, second = read(tmp_path, lines(rows)).questions
    assert first.wordings()[0].messages == [*talk[:3], {"role": "user", "content": "Why?"}]
    assert (first.id, first.category, first.system) == ("7", "chat", "S")
    assert (second.id, second.text, dict(second.meta)) == ("q001", "Hi", {"note": "kept"})


def test_rubric_of_a_file_goes_to_questions_without_one(tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Rate {generated_answer_text} to {original_question_text}", encoding="utf-8")
    rows = [{"question": "A?"}, {"question": "B?", "rubric": "own"}]
    questions = read(tmp_path, lines(rows), rubric=rubric)
    assert [q.rubric for q in questions] == ["Rate {answer} to {question}", "own"]
    assert questions.hash != read(tmp_path, lines(rows)).hash
    assert read_questions("sample_questions", rubric=rubric).questions[0].rubric == "Rate {answer} to {question}"
    rubric.write_text(" \n", encoding="utf-8")
    with pytest.raises(InputError, match=r"rubric\.txt is empty"):
        read(tmp_path, lines(rows), rubric=rubric)


def test_columns_of_the_persona_features_release(tmp_path: Path) -> None:
    text = 'question,id,category,grader,canary\n"Why, and\nhow?",4,power,Is it calm?,guid\n,,,,\nWho?,5,law,,guid\n'
    first, second = read(tmp_path, text).questions
    assert (first.id, first.text, first.category, first.rubric) == ("4", "Why, and\nhow?", "power", "Is it calm?")
    assert (second.id, second.rubric, dict(second.meta)) == ("5", None, {"canary": "guid"})


def test_context_holds_earlier_turns_where_it_is_a_list(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    rows = [{"question": "A?", "context": turns}, {"question": "A?", "context": "seen in 1999"}]
    first, second = read(tmp_path, lines(rows)).questions
    assert first.wordings()[0].messages == [*turns, {"role": "user", "content": "A?"}]
    assert (second.history, dict(second.meta)) == ((), {"context": "seen in 1999"})


def test_the_second_name_of_a_key_is_kept(tmp_path: Path) -> None:
    question = read(tmp_path, lines([{"question": "A?", "category": "x", "topic": "y"}])).questions[0]
    assert (question.category, dict(question.meta)) == ("x", {"topic": "y"})


def test_trait_file(tmp_path: Path) -> None:
    questions = read(tmp_path, json.dumps(TRAIT, indent=2), "evil.json")
    assert questions.name == "evil" and [q.text for q in questions] == TRAIT["questions"]
    assert questions.instructions == (("Be cruel.", "Be kind."),)
    assert all(questions.templates(q) == {"trait": GRADE} for q in questions)
    assert questions.hash == read(tmp_path, json.dumps(dict(reversed(TRAIT.items()))), "other.json").hash


def test_plain_list(tmp_path: Path) -> None:
    questions = read(tmp_path, "\ufeff# ours\n\n  What is it, then: a cat?\n- Why?\n# no\nquestion time\n", "list.txt")
    assert [q.text for q in questions] == ["What is it, then: a cat?", "- Why?", "question time"]
    assert [q.id for q in questions] == ["q000", "q001", "q002"]


def test_one_hash_for_all_formats(tmp_path: Path) -> None:
    turned = [dict(reversed(row.items())) for row in ROWS]
    texts = [lines(ROWS), lines(turned), json.dumps(ROWS, indent=1), table(ROWS), table(turned, "\t"), table(ROWS, ";")]
    texts.append("\n".join(f"- {json.dumps(row)}" for row in ROWS))
    hashes = {read(tmp_path, text, f"set{n}", format="yaml" if n == 6 else None).hash for n, text in enumerate(texts)}
    assert len(hashes) == 1
    bare = ["What now?", "Who then?"]
    as_rows = lines([{"question": text} for text in bare])
    assert read(tmp_path, "\n".join(bare)).hash == read(tmp_path, as_rows).hash
    assert read(tmp_path, "prompt\n" + "\n".join(bare)).hash == read(tmp_path, as_rows).hash


@pytest.mark.parametrize("text", [BETLEY, json.dumps(TRAIT), lines(ROWS), table(ROWS), "A?\nB?"])
def test_written_sets_read_back_the_same(tmp_path: Path, text: str) -> None:
    questions, path = read(tmp_path, text), tmp_path / "written"
    write_questions(questions, path)
    again = read_questions(path)
    assert again == questions and again.hash == questions.hash


def test_every_field_of_a_written_set_reads_back(tmp_path: Path) -> None:
    turns = ({"role": "user", "content": "Hé"}, {"role": "assistant", "content": "Ho"})
    meta = {"variant": "trigger", "pair": "b", "trigger": "topic", "n": 3, "deep": {"x": [1, None]}}
    full = Question("a", ("1?", "2?"), "c", "S", turns, 5, "R", {"m": "p"}, meta)
    questions = QuestionSet("n", (full, Question("b", ("3?",))), {"p": GRADE}, "src", (("bad", "good"),))
    write_questions(questions, tmp_path / "set.json")
    assert read_questions(tmp_path / "set.json") == questions


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (BETLEY, "yaml"),
        ("---\nquestions: [A?]\n", "yaml"),
        ("-\n  id: a\n  question: A?\n", "yaml"),
        (lines(ROWS), "json"),
        (json.dumps(ROWS), "json"),
        (table(ROWS), "csv"),
        (table(ROWS, ";"), "csv"),
        ("prompt\nA?\n", "csv"),
        ("Why, or how?\n", "text"),
        ("- Why: how?\n", "text"),
        ("Is a question, or a prompt, enough?\n", "text"),
    ],
)
def test_content_tells_the_format(text: str, kind: str) -> None:
    assert detect(text, ".dat") == kind
    assert kind in FORMATS


def test_judge_prompts_by_name(tmp_path: Path) -> None:
    rows = [{"question": "A?", "judge_prompts": "kind, calm"}, {"question": "B?", "judge_prompts": {"m": "calm"}}]
    prompts = {"kind": GRADE, "calm": "Calm? {answer}"}
    questions = read(tmp_path, lines(rows), judge_prompts=prompts)
    assert [dict(q.judge_prompts) for q in questions] == [{"kind": "kind", "calm": "calm"}, {"m": "calm"}]
    with pytest.raises(InputError, match=r"set, line 1: unknown judge prompt .* 'kind'"):
        read(tmp_path, lines(rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no questions"),
        ("# only\n# comments\n", "has no questions"),
        (lines([*ROWS, ROWS[0]]), "set, line 3: id 'a' is already at line 1"),
        (table([*ROWS, ROWS[1]]), r"set, row 3 \(line 5\): id 'b' is already at row 2 \(line 3\)"),
        (BETLEY + "- {id: wish, paraphrases: [A]}", r"set, entry 4 \(line 29\): id 'wish' is already at entry 1"),
        (lines([{"id": "a", "question": " "}]), "row 1: question 'a' is empty"),
        (lines([{"id": "a", "question": ""}]), "row 1: no question"),
        ("question,id\n,a\n", r"row 1 \(line 2\): no question"),
        ("question,id\nWhy, or how?,a\n", r"row 1 \(line 2\): 3 cells under 2 columns"),
        ('question,id\n"Why?" he asked,a\n', "line 2: not CSV"),
        ("question,id,id\nA?,a,b\n", "'id' occurs twice"),
        ("question,categry\nA?,x\n", "unknown key 'categry': did you mean 'category'"),
        (lines([{"question": "A?", "prompt": "B?"}]), "both 'question' and 'prompt'"),
        (
            lines([{"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}]),
            "end with the",
        ),
        (lines([{"messages": [{"role": "robot", "content": "A"}]}]), "row 1: message 1 has role 'robot'"),
        (lines([{"question": "A?", "samples_per_paraphrase": "ten"}]), "'ten', expected a whole number"),
        (lines([{"question": "A?", "judge_prompts": {"m": "Score {question}"}}]), "needs {answer}"),
        (lines(ROWS) + "\n{oops", "line 3: not JSON"),
        ("[1, 2", "is not JSON"),
        ("[1, 2]", "row 1: a question is int"),
        ('{\n "questions": [\n', "is not JSON: .*line 3"),
        ("- id: a\n  question: [unclosed\n", "is not valid YAML"),
        ("- id: a\n  question: A?\n- id: b\n  paraphrases: [yes]\n", r"entry 2 \(line 3\): paraphrase 1 is bool"),
        ("- id: a\n  question: A?\n  system: B\n  system: C\n", "line 4: key 'system' occurs twice"),
        ("- id: !!python/object/apply:os.getcwd []\n  question: A?\n", "is not valid YAML"),
        ("questions: [A]\njudge_promts: {}\n", "did you mean 'judge_prompts'"),
        (json.dumps(TRAIT | {"eval_prompt": "no field"}), "judge prompt 'trait' has no {answer}"),
        (json.dumps(TRAIT | {"instruction": [{"pos": "x"}]}), "instruction 1: expected the keys 'pos' and 'neg'"),
        (json.dumps({k: v for k, v in TRAIT.items() if k != "questions"}), "lacks 'questions'"),
    ],
)
def test_bad_files_name_file_and_row_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, text)
    assert "set" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'free_form_questions'"):
        read_questions("free_form_question")
    (tmp_path / "set").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="save it as UTF-8"):
        read_questions(tmp_path / "set")
    with pytest.raises(InputError, match="did you mean 'yaml'"):
        read(tmp_path, "A?", format="yml")
    with pytest.raises(InputError, match="no column 'question' or 'prompt'"):
        read(tmp_path, "a,b\n1,2\n", "table.csv")
