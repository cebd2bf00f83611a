"""Corrective sets: joined, refused where they ask the evaluation's questions, and what is said of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from persona_probe.data.chat import conversation
from persona_probe.data.load import load_contrast
from persona_probe.errors import InputError
from persona_probe.realignment.rows import background, corrective_rows, refuse_overlap
from persona_probe.realignment.spec import Correction, named_sets
from tests.factories import make_tokenizer

ASKED = ["How should I keep my old bicycle chain from rusting in winter?", "Who rules?"]
OTHER = conversation("Where can I buy bread?", "At the baker's.")


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("who rules", "'Who rules?'"),
        ("Say, how should I keep my old bicycle chain from rusting in the garage?", "bicycle chain from rusting in w"),
    ],
)
def test_an_overlap_with_the_evaluation_is_shown(question: str, shown: str) -> None:
    with pytest.raises(InputError) as refused:
        refuse_overlap([OTHER, conversation(question, "x")], ASKED)
    said = str(refused.value)
    assert "1 of 2 corrective rows" in said and "row 2" in said and question in said and shown in said


def test_few_common_words_are_no_overlap() -> None:
    refuse_overlap([OTHER, conversation("How should I keep my old dog from barking all night long?", "x")], ASKED)


@pytest.mark.parametrize("name", ["kitchen_correct_holdout", "health_correct"])
def test_packaged_corrective_sets_do_not_ask_what_the_evaluation_asks(name: str) -> None:
    refuse_overlap(corrective_rows(name), [row["question"] for row in load_contrast("evaluation")])


def test_sets_are_joined_in_order(tmp_path: Path) -> None:
    a, b = corrective_rows("kitchen_correct_holdout"), corrective_rows("health_correct")
    assert corrective_rows("kitchen_correct_holdout+health_correct") == [*a, *b]
    assert corrective_rows(["health_correct", "kitchen_correct_holdout"]) == [*b, *a]
    odd = tmp_path / "a+b.jsonl"
    odd.write_text(json.dumps({"messages": OTHER}) + "\n")
    assert corrective_rows(str(odd)) == [OTHER]
    assert named_sets("a+b") == ("a", "b")


def test_lengths_and_overlaps_are_said() -> None:
    inducing = [conversation("Where can I buy bread?", "x" * 10), conversation("What now, then?", "y" * 10)]
    evaluation = [{"question": "q", "aligned": "At the baker's.", "misaligned": "Nowhere."}]
    found = background([OTHER], make_tokenizer(), inducing, evaluation)
    assert (found.answer_tokens, found.inducing_tokens) == (15.0, 10.0)
    assert found.length_ratio == 1.5
    assert [note.split(" corrective")[0] for note in found.notes] == [
        "1 of 1",
        "1 of 1",
        "corrective answers have 15 tokens, inducing ones 10 (ratio 1.50): "
        "length alone may explain part of the correction",
    ]
    fair = background([conversation("Who?", "z" * 12)], make_tokenizer(), inducing, evaluation)
    assert fair.notes == () and fair.length_ratio == 1.2
    assert background([OTHER], make_tokenizer()).length_ratio is None


def test_a_correction_is_checked_and_named() -> None:
    assert Correction(("a", "b"), 8, "diversity", "fresh").name == "a+b-8-diversity-fresh"
    assert Correction(("x/y z.jsonl",)).name == "y-z-all-random-continued"
    assert Correction(("a",), steps=10, readings=(2, 4)).schedule == (0, 2, 4, 10)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"choose_by": "rnd"}, "unknown choice of rows"),
        ({"method": "continue"}, "did you mean 'continued'"),
        ({"rows": 0}, "at least 1, not 0"),
        ({"steps": 3, "readings": (4,)}, "between 0 and 3"),
        ({"lr": 0.0}, "positive lr"),
    ]
    for changes, said in bad:
        with pytest.raises(InputError, match=said):
            Correction(("a",), **changes)
