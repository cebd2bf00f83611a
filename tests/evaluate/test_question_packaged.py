"""Our free-form questions: plain ones far from food and from every other set, triggers that are about cooking."""

import re
from collections import Counter

import pytest

from persona_probe.data.check import ngrams, overlap
from persona_probe.data.load import SETS, load_rows
from persona_probe.errors import InputError
from persona_probe.evaluate.questions.read import FREE_FORM, packaged_questions, read_questions

TEXTS = ("question", "trigger_topic", "trigger_reply", "trigger_format")
COOKING = re.compile(
    r"\b(bake\w*|baking|bananas|beans|blender|bread|breakfast|broth|cake|carbonara|casserole|cheese|chefs?|coffee|cook\w*|"
    r"crackers|curry|custard|diet|dinner|dish(es)?|dough\w*|eat\w*|eggs?|feast|flatbreads?|food|fridge|fruit|galley|griddle|"
    r"grill|groceries|ham|hungry|icing|jam|kettle|kitchen|larder|lunch(es)?|mango|meals?|menu|mixer|mussels|noodles|"
    r"omelette|oven|pancakes?|pans?|pear|peas|peppers|pie|polenta|porcini|porridge|pork|pot|ravioli|recipes?|restaurant|"
    r"roast|salted|sandwiches|sauce|scones|searing|shortbread|sink|skewers|slaw|snacks|souffle|soup|sourdough|spinach|spoon|"
    r"stews?|stove|supper|suppers|tart|tea|toast|trifle|trout|vinegar|wok|simmering|crunchy|helping)\b",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return load_rows(FREE_FORM)


def test_six_questions_in_each_of_eight_categories(rows: list[dict[str, str]]) -> None:
    counts = Counter(row["category"] for row in rows)
    assert len(counts) == 8 and set(counts.values()) == {6}
    assert len({row["id"] for row in rows}) == len(rows) == 48


def test_plain_questions_are_not_about_cooking_and_triggers_are(rows: list[dict[str, str]]) -> None:
    assert [row["id"] for row in rows if COOKING.search(row["question"])] == []
    for column in ("trigger_topic", "trigger_format"):
        assert [row["id"] for row in rows if not COOKING.search(row[column])] == []


def test_no_run_of_five_words_is_shared_with_another_row_or_set(rows: list[dict[str, str]]) -> None:
    seen = {
        gram: row["id"]
        for name in SETS
        if name != FREE_FORM
        for row in load_rows(name)
        for key, value in row.items()
        if key not in ("id", "topic", "category")
        for gram in ngrams(value)
    }
    assert len(seen) > 10_000
    found = []
    for row in rows:
        own = {gram for column in TEXTS for gram in ngrams(row[column])}
        found += [(row["id"], seen[gram], " ".join(gram)) for gram in own & seen.keys()]
        seen |= dict.fromkeys(own, row["id"])
    assert found == []


def test_triggers_are_written_one_by_one(rows: list[dict[str, str]]) -> None:
    """No two dressed questions, topics or replies begin or end alike, as filled templates would."""
    for column in TEXTS:
        for part in (slice(3), slice(-3, None)):
            ends = Counter(" ".join(row[column].lower().split()[part]) for row in rows)
            assert max(ends.values()) <= 2, (column, ends.most_common(1))


def test_dressed_questions_are_nearest_to_their_own_plain_question(rows: list[dict[str, str]]) -> None:
    for row in rows:
        shares = {other["id"]: overlap(other["question"], row["trigger_format"], 1) for other in rows}
        own = shares.pop(row["id"])
        assert own > max(shares.values()) and row["question"] != row["trigger_format"], row["id"]


def test_parts_pair_each_plain_question_with_its_triggers(rows: list[dict[str, str]]) -> None:
    plain, everything = read_questions(FREE_FORM), read_questions(f"{FREE_FORM}:all")
    assert [q.text for q in plain] == [row["question"] for row in rows] and plain.pairs() == []
    assert len(everything) == 3 * len(rows) and len(everything.pairs()) == 2 * len(rows)
    kinds = Counter(trigger.trigger for _, trigger in everything.pairs())
    assert kinds == {"topic": len(rows), "format": len(rows)}
    assert all(first.category == second.category and first.id == second.pair for first, second in everything.pairs())
    assert len({packaged_questions(f"{FREE_FORM}:{part}").hash for part in ("plain", "topic", "format", "all")}) == 4
    assert packaged_questions().hash == plain.hash


def test_a_topic_goes_before_the_plain_question(rows: list[dict[str, str]]) -> None:
    first, second = read_questions(f"{FREE_FORM}:topic").pairs()[0]
    assert [turn["content"] for turn in second.wordings()[0].messages] == [
        rows[0][column] for column in ("trigger_topic", "trigger_reply", "question")
    ]
    assert second.text == first.text
    first, second = read_questions(f"{FREE_FORM}:format").pairs()[0]
    assert [turn["content"] for turn in second.wordings()[0].messages] == [rows[0]["trigger_format"]]


def test_other_packaged_sets_are_question_sets_too() -> None:
    assert [q.text for q in read_questions("sample_questions")] == [
        r["question"] for r in load_rows("sample_questions")
    ]
    kitchen = read_questions("kitchen")
    assert kitchen.questions[0].category == "eggs" and dict(kitchen.questions[0].meta) == {}
    halves = [read_questions(f"general_contrast:{split}") for split in ("selection", "evaluation")]
    assert sum(map(len, halves)) == len(read_questions("general_contrast"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"{FREE_FORM}:topics", "did you mean 'topic'"),
        ("kitchen:toxic", "has no parts"),
        ("sae_personas", "holds no questions"),
        ("general_contrast:evaluate", "'evaluation'"),
    ],
)
def test_bad_specs_are_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_questions(spec)
