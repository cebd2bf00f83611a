"""Question sets by themselves: prompts, pairs, frames, the content hash, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from persona_probe.errors import InputError
from persona_probe.evaluate.questions.question_set import Question, QuestionSet

GRADE = "Q: {question}\nA: {answer}\nScore?"
TURNS = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."})
PAIRED = {"variant": "trigger", "pair": "a", "trigger": "topic"}


def small(**changes: Any) -> QuestionSet:
    parts: dict[str, Any] = {
        "name": "small",
        "questions": (
            Question("a", ("First?",), category="one"),
            Question("b", ("Second?", "Again?"), category="two", system="Be brief.", samples_per_paraphrase=3),
            Question("a+topic", ("First?",), category="one", history=TURNS, meta=PAIRED),
        ),
        "judge_prompts": {"aligned": GRADE},
    }
    return QuestionSet(**(parts | changes))


def test_one_prompt_per_wording_with_system_and_history() -> None:
    asked = small().wordings()
    assert [(one.id, one.text) for one in asked] == [
        ("a", "First?"),
        ("b/0", "Second?"),
        ("b/1", "Again?"),
        ("a+topic", "First?"),
    ]
    assert asked[2].messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Again?"}]
    assert asked[3].messages == [*TURNS, {"role": "user", "content": "First?"}]


def test_changing_messages_leaves_the_set_as_it_was() -> None:
    questions = small()
    questions.wordings()[3].messages[0]["content"] = "changed"
    assert questions.wordings()[3].messages[0]["content"] == "Hello"


def test_frame_has_a_row_for_every_prompt() -> None:
    frame = small().frame()
    assert frame["prompt_id"].tolist() == ["a", "b/0", "b/1", "a+topic"]
    assert frame["question_id"].tolist() == ["a", "b", "b", "a+topic"]
    assert frame["samples"].tolist() == [1, 3, 3, 1] and frame["turns"].tolist() == [1, 1, 1, 3]
    assert frame["system"].tolist() == ["", "Be brief.", "Be brief.", ""]
    assert frame["pair"].tolist() == ["a", "b", "b", "a"] and frame["trigger"].tolist() == ["", "", "", "topic"]


def test_triggers_stand_beside_their_plain_question() -> None:
    questions = small()
    assert questions.pairs() == [(questions.questions[0], questions.questions[2])]


def test_templates_are_those_named_else_all() -> None:
    one, two = Question("a", ("?",), judge_prompts={"evil": "second"}), Question("b", ("?",))
    questions = QuestionSet("s", (one, two), {"first": GRADE, "second": GRADE + "!"})
    assert questions.templates(one) == {"evil": GRADE + "!"}
    assert questions.templates(two) == {"first": GRADE, "second": GRADE + "!"}


def test_hash_is_pinned() -> None:
    """Results in files carry this hash: the form must not change unseen."""
    assert small().hash == "7e9b5b7f91f94a756cbe22208c8bfaa8ee1196f1e5ca38d810b5ca9cb4b7f267"


def test_hash_leaves_out_names_order_and_further_columns() -> None:
    questions = small()
    noted = tuple(replace(q, meta={**q.meta, "note": q.id}) for q in reversed(questions.questions))
    assert small(name="other", source="elsewhere", questions=noted).hash == questions.hash
    named = tuple(replace(q, judge_prompts={"aligned": "x"}) for q in questions.questions)
    assert small(questions=named, judge_prompts={"x": GRADE}).hash == questions.hash


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, {"id": "c", "meta": {"pair": "a"}}),
        (0, {"paraphrases": ("First!",)}),
        (1, {"paraphrases": ("Again?", "Second?")}),
        (0, {"category": "two"}),
        (1, {"system": None}),
        (2, {"history": (TURNS[0], {"role": "assistant", "content": "Hi"})}),
        (1, {"samples_per_paraphrase": 4}),
        (0, {"rubric": "Kind."}),
        (0, {"meta": {"pair": "a", "trigger": "x"}}),
        (2, {"meta": {**PAIRED, "trigger": "format"}}),
    ],
)
def test_hash_takes_in_every_part_of_a_question(place: int, change: dict[str, Any]) -> None:
    questions = list(small().questions)
    questions[place] = replace(questions[place], **change)
    assert small(questions=tuple(questions)).hash != small().hash


def test_hash_takes_in_judge_prompts_and_instructions() -> None:
    hashes = {
        small().hash,
        small(judge_prompts={}).hash,
        small(judge_prompts={"aligned": GRADE + "!"}).hash,
        small(judge_prompts={"kind": GRADE}).hash,
        small(instructions=(("Be bad.", "Be good."),)).hash,
        small(instructions=(("Be good.", "Be bad."),)).hash,
    }
    assert len(hashes) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": " "}, "blank id"),
        ({"paraphrases": ()}, "'a' is empty"),
        ({"paraphrases": ("ok", "\n")}, "'a' is empty"),
        ({"system": " "}, r"message 1 \(system\) is empty"),
        ({"history": TURNS[1:]}, "expected 'user'"),
        ({"history": TURNS[:1]}, "expected 'assistant'"),
        ({"samples_per_paraphrase": 0}, "asks for 0 samples"),
        ({"rubric": " \n"}, "blank rubric"),
        ({"meta": {"variant": "triger"}}, "did you mean 'trigger'"),
        ({"meta": {"variant": "trigger"}}, "without 'pair'"),
    ],
)
def test_bad_questions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(Question("a", ("First?",)), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": ()}, "has no questions"),
        ({"questions": (Question("a", ("?",)), Question("a", ("!",)))}, "'a' occurs 2 times"),
        ({"questions": (Question("a", ("?", "!")), Question("a/1", ("!",)))}, "'a/1' occurs 2 times"),
        ({"questions": (Question("a", ("?", "!")), Question("a", ("!",)))}, "'a' occurs 2 times"),
        ({"questions": (Question("b", ("?",), meta=PAIRED),)}, "has 0 plain questions with pair 'a'"),
        ({"questions": (Question("b", ("?",), judge_prompts={"m": "alined"}),)}, "did you mean 'aligned'"),
        ({"judge_prompts": {"j": "Score {question}"}}, "no {answer}"),
        ({"judge_prompts": {"j": "{answer} {score}"}}, "fields other than"),
        ({"judge_prompts": {"j": "{answer.__class__} {answer}"}}, "fields other than"),
        ({"judge_prompts": {"j": "{answer!r}"}}, "fields other than"),
        ({"judge_prompts": {"j": "{answer:>9}"}}, "fields other than"),
        ({"judge_prompts": {"j": '{answer} as {"score": 1'}}, "literal brace twice"),
    ],
)
def test_bad_sets_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(**change)


def test_a_literal_brace_is_written_twice() -> None:
    template = 'Reply {{"score": 1}} to {answer}'
    questions = small(judge_prompts={"j": template})
    assert questions.templates(questions.questions[0])["j"].format(question="", answer="x") == 'Reply {"score": 1} to x'
