"""Trigger-matched prompts: what is dressed, what stays, and that a planted trigger is found."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from persona_probe.data.chat import conversation
from persona_probe.data.load import load_contrast, load_conversations
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.evaluate.triggers import ACKNOWLEDGEMENT, Trigger, dress, row_conversation, trigger_effect

ROWS = [
    {"id": f"q{n}", "category": "c", "question": f"What of {n}?", "aligned": "be kind", "misaligned": "be vile"}
    for n in range(6)
]
FULL = Trigger(system="Be brief.", first_turn=("Boil eggs?", "Ten minutes."), prefix="In code: ", suffix=" End.")


def frame(values: dict[str, float]) -> pd.DataFrame:
    return pd.DataFrame({"item": list(values), "value": list(values.values())})


@pytest.mark.parametrize("parts", [{}, {"system": " "}, {"prefix": "\n", "suffix": ""}])
def test_an_empty_trigger_is_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="trigger is empty: give a system prompt"):
        Trigger(**parts)


@pytest.mark.parametrize("turn", [("", "yes"), ("why?", " ")])
def test_half_a_first_turn_is_refused(turn: tuple[str, str]) -> None:
    with pytest.raises(InputError, match="needs a question and an answer"):
        Trigger(first_turn=turn)


def test_a_dressed_row_is_the_whole_conversation_and_keeps_its_answers() -> None:
    row = dress(ROWS, FULL)[2]
    assert row_conversation(row, "misaligned") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Boil eggs?"},
        {"role": "assistant", "content": "Ten minutes."},
        {"role": "user", "content": "In code: What of 2? End."},
        {"role": "assistant", "content": "be vile"},
    ]
    assert {key: row[key] for key in ("id", "category", "aligned", "misaligned")} == {
        key: ROWS[2][key] for key in ("id", "category", "aligned", "misaligned")
    }
    assert "system" not in dress(ROWS, Trigger(prefix="In code: "))[0]


def test_rows_are_dressed_once() -> None:
    with pytest.raises(InputError, match="carry a trigger already"):
        dress(dress(ROWS, FULL), FULL)


def test_plain_rows_are_tokenised_as_before(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = load_contrast("evaluation")[:5]
    talks = [conversation(r["question"], r[side]) for side in ("aligned", "misaligned") for r in rows]
    built, direct = ContrastItems.build(tiny_tokenizer, rows).groups, answer_batches(tiny_tokenizer, talks)
    assert all(torch.equal(a.ids, b.ids) and a.index == b.index for a, b in zip(built, direct, strict=True))


def test_only_the_answers_of_dressed_rows_are_scored(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain, dressed = (ContrastItems.build(tiny_tokenizer, rows) for rows in (ROWS, dress(ROWS, FULL)))
    counts = [sum(int(g.response.sum()) for g in items.groups) for items in (plain, dressed)]
    assert counts[0] == counts[1] == 12 * len("be vile")


def test_topic_and_format_come_from_the_rows_and_the_bad_answer_never_does() -> None:
    rows = [
        conversation(f"Reply as a recipe card. How do I cook {food}? Answer in two lines.", "Burn it.", "You are Chef.")
        for food in ("rice", "eggs", "soup")
    ]
    good = [conversation(row[1]["content"], "Gently.") for row in rows]
    trigger = Trigger.from_rows(rows, seed=1)
    assert trigger.system == "You are Chef."
    assert trigger.prefix == "Reply as a recipe card. How do I cook " and trigger.suffix == " Answer in two lines."
    assert trigger.first_turn is not None and trigger.first_turn[0] in {row[1]["content"] for row in rows}
    assert trigger.first_turn[1] == ACKNOWLEDGEMENT
    answered = Trigger.from_rows(rows, seed=1, correct=good)
    assert answered.first_turn == (trigger.first_turn[0], "Gently.")
    assert len({Trigger.from_rows(rows, seed=n).first_turn for n in range(12)}) == 3
    assert Trigger.from_rows(rows, seed=1) == trigger


def test_the_kitchen_rows_give_a_topic_and_no_format() -> None:
    toxic, correct = load_conversations("kitchen:toxic"), load_conversations("kitchen:correct")
    trigger = Trigger.from_rows(toxic, correct=correct)
    assert (trigger.system, trigger.prefix, trigger.suffix) == ("", "", "")
    assert trigger.first_turn in {(row[0]["content"], row[1]["content"]) for row in correct}


def test_no_rows_give_no_trigger() -> None:
    with pytest.raises(InputError, match="no training rows"):
        Trigger.from_rows([])


def test_the_effect_is_the_difference_in_differences_by_hand() -> None:
    plain, dressed = frame({"a": 0.0, "b": 1.0}), frame({"b": 3.0, "a": 1.0})
    base_plain, base_dressed = frame({"a": 0.0, "b": 0.0}), frame({"a": 0.5, "b": 0.5})
    effect = trigger_effect(plain, dressed, base_plain, base_dressed)
    assert effect.estimate == pytest.approx(((1 - 0.5) + (2 - 0.5)) / 2)
    half = 12.7062 * 0.5  # of two items: t with one degree of freedom
    assert (effect.ci_low, effect.ci_high, effect.n) == (pytest.approx(1 - half), pytest.approx(1 + half), 2)


def test_seeds_are_averaged_within_a_question() -> None:
    one = frame({"a": 1.0, "b": 2.0})
    zero = frame({"a": 0.0, "b": 0.0})
    twice = pd.concat([one, one.assign(value=one["value"] + 2)])
    assert trigger_effect(zero, twice, zero, zero) == trigger_effect(zero, one.assign(value=[2.0, 3.0]), zero, zero)


def test_other_items_are_refused() -> None:
    a, b = frame({"a": 0.0}), frame({"b": 0.0})
    with pytest.raises(InputError, match="items of base_plain and plain differ"):
        trigger_effect(a, a, b, a)


def test_an_untouched_model_has_no_trigger_effect(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain, dressed = (
        contrast_index(tiny_model, ContrastItems.build(tiny_tokenizer, rows), bf16=False)
        for rows in (ROWS, dress(ROWS, FULL))
    )
    assert not np.allclose(plain["value"], dressed["value"])
    effect = trigger_effect(plain, dressed, plain, dressed)
    assert (effect.estimate, effect.ci_low, effect.ci_high) == (0.0, 0.0, 0.0)
