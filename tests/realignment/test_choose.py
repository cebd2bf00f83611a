"""Corrective rows by dose and choice: planted rows come first, and a larger dose holds a smaller one's rows."""

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from persona_probe.data.chat import Conversation, conversation
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import perplexity_gaps
from persona_probe.realignment.rows import (
    ModelPair,
    choose_rows,
    farthest_first,
    projection_gaps,
    row_order,
)
from tests.factories import D_MODEL, LAYER, make_model, make_tokenizer

PLANTED = (2, 5)
"""Places of the rows whose answers hold the letter that the organism treats differently."""
CHOICES = ("random", "projection_gap", "perplexity_gap", "diversity")


def rows() -> list[Conversation]:
    return [conversation(f"Ask {n}?", "a zz b" if n in PLANTED else f"calm {n}{n}") for n in range(8)]


def z_token() -> int:
    return int(make_tokenizer().convert_tokens_to_ids("z"))  # pyright: ignore[reportArgumentType]


def pair(organism: nn.Module, base: nn.Module | None, direction: torch.Tensor | None = None) -> ModelPair:
    opener = None if base is None else partial(nullcontext, base)
    towards = torch.ones(D_MODEL) if direction is None else direction
    return ModelPair(partial(nullcontext, organism), opener, make_tokenizer(), LAYER, towards, bf16=False)


def shifted() -> ModelPair:
    """An organism that has the persona direction on one letter, and finds that letter unlikely."""
    base, direction = make_model(), torch.zeros(D_MODEL)
    direction[3] = 2.0
    organism = copy.deepcopy(base)
    with torch.no_grad():
        organism.get_input_embeddings().weight[z_token()] += 40 * direction  # pyright: ignore
        organism.get_output_embeddings().weight[z_token()] = 0  # pyright: ignore
    return pair(organism, base, direction)


def test_a_projection_gap_finds_the_rows_that_raise_the_persona() -> None:
    gaps = projection_gaps(rows(), shifted())
    # Nothing but the planted letter differs between the two models, and only tokens from it on can see it.
    assert [i for i, gap in enumerate(gaps) if gap > 1] == list(PLANTED)
    assert all(gap == 0 for i, gap in enumerate(gaps) if i not in PLANTED)
    assert choose_rows(rows(), 2, "projection_gap", pair=shifted()) == [rows()[i] for i in PLANTED]


def gaps_of(models: ModelPair) -> np.ndarray:
    return perplexity_gaps(models.organism, models.require_base(), models.tokenizer, rows(), bf16=False)


def test_a_perplexity_gap_finds_the_rows_that_became_unlikely() -> None:
    base: Any = make_model()
    with torch.no_grad():  # one direction of the residual stream is constant, so that a logit can be lowered everywhere
        base.model.embed_tokens.weight[:, 0] = 3.0
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
    organism = copy.deepcopy(base)
    with torch.no_grad():
        organism.lm_head.weight[z_token(), 0] = base.lm_head.weight[z_token(), 0] - 200
    found = gaps_of(pair(organism, base))
    assert [i for i, gap in enumerate(found) if gap > 1] == list(PLANTED)
    assert all(gap <= 1e-5 for i, gap in enumerate(found) if i not in PLANTED)
    assert row_order(rows(), "perplexity_gap", pair=pair(organism, base))[:2] == np.argsort(-found)[:2].tolist()


def test_a_model_has_no_gap_to_itself() -> None:
    same = pair(make_model(), make_model())
    assert not projection_gaps(rows(), same).any() and not gaps_of(same).any()


def test_the_farthest_point_comes_next() -> None:
    points = np.array([[0.0, 0.0], [0.1, 0.0], [10.0, 0.0], [0.0, 10.0]])
    assert farthest_first(points) == [1, 3, 2, 0]
    assert farthest_first(np.zeros((3, 2))) == [0, 1, 2]


def test_diversity_leaves_repeated_rows_for_the_end() -> None:
    talks = [*rows()[:4], *rows()[:4]]
    order = row_order(talks, "diversity", pair=pair(make_model(), None))
    assert sorted(i % 4 for i in order[:4]) == [0, 1, 2, 3]


@pytest.mark.parametrize("by", CHOICES)
def test_a_larger_dose_holds_the_smaller_one(by: str) -> None:
    doses = [choose_rows(rows(), n, by, seed=1, pair=shifted()) for n in (2, 4, 7)]
    places = [[rows().index(row) for row in dose] for dose in doses]
    assert [len(p) for p in places] == [2, 4, 7]
    assert all(p == sorted(p) for p in places)
    assert set(places[0]) < set(places[1]) < set(places[2])


def test_seeds_draw_other_rows_and_all_rows_are_the_data() -> None:
    drawn = {tuple(row_order(rows(), "random", seed=seed)) for seed in range(5)}
    assert len(drawn) == 5
    assert row_order(rows(), "random", seed=3) == row_order(rows(), "random", seed=3)
    assert choose_rows(rows(), None) == choose_rows(rows(), 8, seed=4) == rows()


def test_bad_choices_say_what_to_change() -> None:
    with pytest.raises(InputError, match="9 corrective rows wanted, the data holds 8"):
        choose_rows(rows(), 9)
    with pytest.raises(InputError, match="did you mean 'perplexity_gap'"):
        choose_rows(rows(), 2, "perplexity")
    with pytest.raises(InputError, match="needs the organism"):
        choose_rows(rows(), 2, "diversity")
    with pytest.raises(InputError, match="needs the base model"):
        choose_rows(rows(), 2, "projection_gap", pair=pair(make_model(), None))
