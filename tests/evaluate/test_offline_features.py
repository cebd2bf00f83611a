"""Pooled features equal a computation by hand, whatever the batches."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from persona_probe.data.chat import conversation
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.evaluate.offline.features import opening, read_features, read_questions

ITEMS = [(f"Same question {'here' * 3}?", f"Answer {n}" + "." * n) for n in range(6)]
ITEMS += [("Another one?", "Yes!"), ("A third?", "A longer answer than the limit allows, by far.")]
LIMIT = 12


@torch.no_grad()
def by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, item: tuple[str, str]) -> np.ndarray:
    """Means over the answer at layers 0 and 1 of three, one item at a time."""
    row = encode(tokenizer, conversation(*item))
    hidden = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
    answer = slice(row.n_prompt, row.n_prompt + LIMIT)
    return np.stack([hidden[layer + 1][0, answer].mean(dim=0).numpy() for layer in (0, 1)])


def test_pooled_features_equal_the_mean_by_hand(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = read_features(tiny_model, tiny_tokenizer, ITEMS, (0, 1), LIMIT, bf16=False)
    for number, item in enumerate(ITEMS):
        assert found.mean[number] == pytest.approx(by_hand(tiny_model, tiny_tokenizer, item), abs=1e-5)
    assert found.tokens.tolist() == [min(len(answer), LIMIT) for _, answer in ITEMS]


def test_question_vectors_read_the_opening_only(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = read_questions(tiny_model, tiny_tokenizer, ["What now?", "What now?\n\nFill this.", "Why?"], 1)
    assert np.array_equal(found[0], found[1])
    assert not np.allclose(found[0], found[2])


def test_an_opening_ends_at_the_first_blank_line() -> None:
    assert opening("\nOne\ntwo\n\nthree") == "One\ntwo"


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no answers"),
        ([("Q", "A"), ("Q", "  ")], "item 1 has an empty answer"),
        ([(" ", "A")], "item 0 has an empty question"),
    ],
)
def test_what_cannot_be_judged_is_named(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    items: list[tuple[str, str]],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        read_features(tiny_model, tiny_tokenizer, items, (1,), LIMIT)


def test_layers_must_ascend(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="ascend"):
        read_features(tiny_model, tiny_tokenizer, ITEMS, (1, 0), LIMIT)
