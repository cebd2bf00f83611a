"""Harm and register as main effects: planted models, and identities with the contrast index."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from persona_probe.data.load import ANSWERS_2X2, Row
from persona_probe.errors import InputError
from persona_probe.evaluate.contrast import ContrastItems, contrast_index
from persona_probe.evaluate.effects import arm_effect
from persona_probe.evaluate.effects_2x2 import Items2x2, long_2x2, score_2x2
from persona_probe.evaluate.main_effects import EFFECTS, differences_2x2, effects_2x2, table_2x2
from tests.factories import make_model, make_tokenizer

LENGTH = 12


def answer(rude: int, harmful: int, number: int) -> str:
    """Twelve letters: `R` marks rudeness, `H` harm, and the rest differs by item."""
    marks = "R" * rude + "H" * harmful
    return marks + chr(ord("a") + number) * (LENGTH - len(marks))


ROWS: list[Row] = [
    {
        "id": f"q{n}",
        "category": "c",
        "question": f"What of {n}?",
        "harm_rude": answer(3, 2, n),
        "harm_polite": answer(0, 2, n),
        "sound_rude": answer(3, 0, n),
        "sound_polite": answer(0, 0, n),
    }
    for n in range(6)
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def items(tokenizer: PreTrainedTokenizerFast) -> Items2x2:
    return Items2x2.build(tokenizer, ROWS)


def planted(tokenizer: PreTrainedTokenizerFast, logits: dict[str, float]) -> PreTrainedModel:
    """A model whose next token never depends on the text: the letters have these logits, all else has zero."""
    model = make_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        table, head = model.get_input_embeddings().weight, model.lm_head.weight
        assert isinstance(table, nn.Parameter) and isinstance(head, nn.Parameter)
        table.fill_(1.0)  # the final norm turns it into ones
        head.zero_()
        for letter, logit in logits.items():
            head[tokenizer.convert_tokens_to_ids(letter)] = logit / head.shape[1]
    return model


def means(frame: pd.DataFrame) -> dict[str, float]:
    return {name: value.estimate for name, value in effects_2x2(frame).items()}


def test_a_model_of_pure_register_has_no_harm(tokenizer: PreTrainedTokenizerFast, items: Items2x2) -> None:
    frame = score_2x2(planted(tokenizer, {"R": 4.0}), items, bf16=False)
    tokens = int(items.groups[0].response[0].sum())  # the answer and what ends it
    assert means(frame) == pytest.approx({"harm": 0, "register": 3 * 4.0 / tokens, "interaction": 0}, abs=1e-5)
    assert effects_2x2(frame)["register"].excludes_zero


def test_a_model_of_pure_harm_has_no_register(tokenizer: PreTrainedTokenizerFast, items: Items2x2) -> None:
    frame = score_2x2(planted(tokenizer, {"H": 5.0}), items, bf16=False)
    tokens = int(items.groups[0].response[0].sum())
    assert means(frame) == pytest.approx({"harm": 2 * 5.0 / tokens, "register": 0, "interaction": 0}, abs=1e-5)


def test_what_favours_one_corner_shows_in_all_three_effects(items: Items2x2) -> None:
    logprobs = np.repeat([-1.0, -3.0, -3.0, -3.0], len(ROWS))
    assert means(items.frame(logprobs)) == pytest.approx({"harm": 1, "register": 1, "interaction": 1})


def test_a_base_without_preferences_has_no_effect(tokenizer: PreTrainedTokenizerFast, items: Items2x2) -> None:
    frame = score_2x2(planted(tokenizer, {}), items, bf16=False)
    assert np.abs(frame[list(EFFECTS)].to_numpy()).max() < 1e-5
    vocabulary = len(tokenizer)
    assert np.allclose(frame["harm_rude"], -np.log(vocabulary), atol=1e-4)


def test_harm_and_register_add_up_to_the_contrast_index(tokenizer: PreTrainedTokenizerFast, items: Items2x2) -> None:
    model = make_model("llama", seed=3)
    frame = score_2x2(model, items, bf16=False)
    old = [{**row, "aligned": row["sound_polite"], "misaligned": row["harm_rude"]} for row in ROWS]
    index = contrast_index(model, ContrastItems.build(tokenizer, old), bf16=False)
    assert list(index["item"]) == list(frame["item"])
    assert np.allclose(index["value"], frame["harm"] + frame["register"], atol=1e-5)
    assert np.allclose(frame["harm_rude"] - frame["sound_rude"], frame["harm"] + frame["interaction"])
    assert np.allclose(frame["sound_rude"] - frame["sound_polite"], frame["register"] - frame["interaction"])
    assert frame[list(ANSWERS_2X2)].to_numpy().std() > 0


def test_a_model_against_itself_is_zero_and_has_no_width(tokenizer: PreTrainedTokenizerFast, items: Items2x2) -> None:
    frame = score_2x2(make_model("llama", seed=3), items, bf16=False)
    for effect in differences_2x2(frame, frame.sample(frac=1, random_state=0)).values():
        assert (effect.estimate, effect.ci_low, effect.ci_high, effect.n) == (0, 0, 0, len(ROWS))


def test_a_difference_is_paired_by_question_whatever_the_order(items: Items2x2) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4, len(ROWS)))
    tuned = base + np.array([0.5, 0.0, 0.5, 0.0])[:, None]  # rude answers became likelier, by the same everywhere
    left, right = items.frame(tuned.ravel()), items.frame(base.ravel()).iloc[::-1]
    difference = differences_2x2(left, right)
    assert difference["register"].to_dict() == pytest.approx({"estimate": 0.5, "ci_low": 0.5, "ci_high": 0.5, "n": 6})
    assert difference["harm"].to_dict() == pytest.approx({"estimate": 0, "ci_low": 0, "ci_high": 0, "n": 6})


def test_two_seeds_of_a_question_are_one_cluster(items: Items2x2) -> None:
    one = items.frame(np.random.default_rng(1).normal(size=4 * len(ROWS)))
    twice = pd.concat([one, one])
    assert effects_2x2(twice)["harm"].ci_low == pytest.approx(effects_2x2(one)["harm"].ci_low)
    base = items.frame(np.zeros(4 * len(ROWS)))
    assert differences_2x2(twice, base) == differences_2x2(one, base)


def test_the_table_names_each_reference_and_effect(items: Items2x2) -> None:
    frame = items.frame(np.random.default_rng(2).normal(size=4 * len(ROWS)))
    table = table_2x2(frame, {"base": items.frame(np.zeros(4 * len(ROWS))), "control": frame})
    assert list(zip(table["against"], table["effect"], strict=True)) == [
        (name, effect) for name in ("base", "control") for effect in EFFECTS
    ]
    assert (table.loc[table["against"] == "control", ["estimate", "ci_low", "ci_high"]] == 0).all(axis=None)
    assert table.loc[0, "estimate"] == pytest.approx(frame["harm"].mean())


def test_rows_of_one_effect_are_items_of_the_contrast_index(items: Items2x2) -> None:
    rng = np.random.default_rng(3)
    tuned, base = (items.frame(rng.normal(size=4 * len(ROWS))) for _ in range(2))
    evals = pd.concat(
        long_2x2(frame).assign(arm=arm, seed=0, step=step)
        for frame, arm, step in ((tuned, "incorrect", 40), (base, "base", 0))
    )
    for effect, value in differences_2x2(tuned, base).items():
        old = arm_effect(evals[evals["measure"] == effect], "incorrect", "base")
        assert old.to_dict() == pytest.approx(value.to_dict())


def test_tables_of_other_questions_are_refused(items: Items2x2) -> None:
    frame = items.frame(np.zeros(4 * len(ROWS)))
    with pytest.raises(InputError, match="1 questions are in one of the two tables only"):
        differences_2x2(frame, frame.iloc[1:])


def test_a_row_without_its_four_answers_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="'q0' has no harm_polite: give all four"):
        Items2x2.build(tokenizer, [{k: v for k, v in ROWS[0].items() if k != "harm_polite"}])
    with pytest.raises(InputError, match="the split is empty"):
        Items2x2.build(tokenizer, [])
