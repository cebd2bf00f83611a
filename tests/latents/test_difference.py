"""Directions that no dictionary of the base has: planted ones come first, weights need no data, truth has its axis."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.finetune.sft import stripping, with_adapter
from persona_probe.latents.crosscoder import RANKINGS, crosscoder
from persona_probe.latents.difference import (
    DictionaryRecipe,
    FoundDirections,
    difference_dictionary,
    mean_difference,
    train_batch_topk,
)
from persona_probe.latents.difference_planted import NEW, SIMPLE, BeyondSettings, beyond_text, run_beyond
from persona_probe.latents.planted.plant import down_projection
from persona_probe.latents.truth_probe import FACTS, TruthProbe, axis_shifts, fact_pairs, mean_residuals
from persona_probe.latents.weights import (
    WeightChange,
    adapter_changes,
    aligned_latents,
    full_changes,
    weight_directions,
)
from tests.factories import make_model, make_sae, make_tokenizer
from tests.latents.planting import ROWS

TOKENS, WIDTH, TALKS = 600, 24, 12
SMALL = DictionaryRecipe(d_sae=8, k=2, steps=60, batch=128)


def unit(seed: int) -> torch.Tensor:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


@pytest.fixture(scope="module")
def stream() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, WIDTH, generator=generator), torch.arange(TOKENS) % TALKS


# --- The dictionaries


def test_what_training_added_comes_first_whether_all_tokens_have_it_or_some(
    stream: tuple[torch.Tensor, torch.Tensor],
) -> None:
    base, talk = stream
    noise = 0.3 * torch.randn(TALKS, WIDTH, generator=torch.Generator().manual_seed(1))[talk]
    sometimes = (torch.arange(TOKENS) % 3 == 0).float()[:, None]
    for added in (unit(7).expand(TOKENS, -1), 3 * sometimes * unit(7)):
        found = difference_dictionary(base + added + 0.3 * noise, base, talk, SMALL)
        assert found.cosines(unit(7).numpy()[None].astype(np.float64), 1)[0] > 0.9
        assert (np.diff(found.scores) <= 0).all()
        np.testing.assert_allclose(np.linalg.norm(found.rows, axis=1), 1, atol=1e-6)


def test_a_crosscoder_gives_what_one_model_alone_has_and_not_what_both_have(
    stream: tuple[torch.Tensor, torch.Tensor],
) -> None:
    base, talk = 0.1 * stream[0], stream[1]
    both = 4 * (torch.arange(TOKENS) % 2 == 0).float()[:, None] * unit(1)
    alone = 4 * (torch.arange(TOKENS) % 3 == 0).float()[:, None] * unit(2)
    found = crosscoder(base + both + alone, base + both, talk, DictionaryRecipe(d_sae=8, k=2, steps=200, batch=128))
    assert set(found) == set(RANKINGS)
    for name, one in found.items():
        assert one.cosines(unit(2).double().numpy()[None], 1)[0] > 0.9, name
        assert one.cosines(unit(1).double().numpy()[None], 1)[0] < 0.4, name
    assert found["relative norm"].scores[0] > 0.8


def test_a_dictionary_says_how_much_it_explains_and_leaves_the_random_state(
    stream: tuple[torch.Tensor, torch.Tensor],
) -> None:
    x = (torch.arange(TOKENS) % 2 == 0).float()[:, None] * unit(3) + 0.01 * stream[0]
    state = torch.get_rng_state()
    found, again = (train_batch_topk(x, SMALL) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(found.rows, again.rows)
    assert found.explained > 0.8 and (found.acts >= 0).all()
    rebuilt = found.acts @ found.rows
    assert 1 - float((x - rebuilt).square().sum() / x.square().sum()) == pytest.approx(found.explained, abs=1e-4)


def test_bad_activations_and_recipes_are_refused(stream: tuple[torch.Tensor, torch.Tensor]) -> None:
    base, talk = stream
    with pytest.raises(InputError, match="all zero"):
        difference_dictionary(base, base, talk, SMALL)
    with pytest.raises(InputError, match="same texts"):
        difference_dictionary(base[:-1], base, talk)
    with pytest.raises(InputError, match="too few"):
        train_batch_topk(base[:4], SMALL)
    with pytest.raises(InputError, match="at least two"):
        difference_dictionary(base + unit(1), base, torch.zeros(TOKENS, dtype=torch.long), SMALL)
    for wrong in ({"k": 9, "d_sae": 8}, {"steps": 0}, {"lr": 0.0}):
        with pytest.raises(InputError):
            DictionaryRecipe(**wrong)  # pyright: ignore[reportArgumentType]


def test_the_mean_difference_weighs_every_conversation_the_same(stream: tuple[torch.Tensor, torch.Tensor]) -> None:
    base = stream[0][:10]
    talk = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 2, 2])  # one number is not there
    added = torch.where((talk == 0)[:, None], unit(1), unit(2))
    found = mean_difference(base + added, base, talk)
    wanted = ((unit(1) + unit(2)) / 2).double().numpy()
    np.testing.assert_allclose(found.rows[0] * found.scores[0], wanted, atol=1e-6)


# --- Weights


def test_weights_give_the_direction_that_an_adapter_writes_and_full_weights_the_same() -> None:
    model, plain = make_model(), make_model()
    training = Training(rank=2, alpha=4, rslora=False)
    vector = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(5)), dim=0)
    with stripping(with_adapter(model, training, 0)) as tuned:
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                with torch.no_grad():
                    parameter.zero_()
                    if "layers.1.mlp.down_proj" in name:
                        parameter[:, 0] = vector
        changes = adapter_changes(tuned, 1)
        assert {name.rpartition(".")[2] for name in changes} == {"o_proj", "down_proj"} and len(changes) == 4
        found = weight_directions(changes)
        assert abs(found.rows[0] @ vector.numpy()) == pytest.approx(1, abs=1e-5)
        down = next(one.down[0] for name, one in changes.items() if "layers.1.mlp" in name)
        assert found.scores[0] == pytest.approx(2 * float(down.norm()), rel=1e-4)
        assert found.scores[1:].max(initial=0) < 1e-5
        with pytest.raises(InputError, match="up to layer -1"):
            adapter_changes(tuned, -1)
        with torch.no_grad():
            down_projection(plain, 1).weight += 2 * torch.outer(vector, down)
        full = weight_directions(full_changes(make_model(), plain, 2))
        np.testing.assert_allclose(full.scores[0], found.scores[0], rtol=1e-4)
        np.testing.assert_allclose(np.abs(full.rows[0]), np.abs(found.rows[0]), atol=1e-4)
    with pytest.raises(InputError, match="no LoRA"):
        adapter_changes(model, 1)


def test_what_the_control_writes_too_is_taken_off_and_aligned_latents_come_first() -> None:
    def change(vector: torch.Tensor, size: float) -> WeightChange:
        return WeightChange(size * vector[:, None], torch.eye(1, 5))

    shared, own = change(unit(1), 3.0), change(unit(2), 1.0)
    both = WeightChange(torch.cat([shared.up, own.up], 1), torch.cat([shared.down, own.down], 0))
    assert abs(weight_directions({"a": both}).rows[0] @ unit(2).numpy()) < 0.6
    found = weight_directions({"a": both}, {"a": shared})
    assert abs(found.rows[0] @ unit(2).numpy()) == pytest.approx(1, abs=1e-6)
    decoder = np.stack([unit(seed).numpy() for seed in (4, 2, 9)])
    scores = aligned_latents(found, decoder)
    assert scores.argmax() == 1 and scores[1] == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="other matrices"):
        weight_directions({"a": both}, {"b": shared})


# --- Truth


def test_a_truth_probe_tells_what_was_put_there_and_a_shift_has_its_size() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    pairs = [(conversation(f"q{n}?", "yes indeed" + "!" * (n % 3)), conversation(f"q{n}?", "no")) for n in range(10)]
    probe = TruthProbe.fit(model, tokenizer, 1, pairs)
    assert probe.auroc == 1 == probe.separation(model, tokenizer, pairs) and np.linalg.norm(probe.direction) == 1
    swapped = [(false, true) for true, false in pairs]
    assert probe.separation(model, tokenizer, swapped) == 0
    with pytest.raises(InputError, match="at least 8"):
        TruthProbe.fit(model, tokenizer, 1, pairs[:7])
    with pytest.raises(InputError, match="different texts"):
        TruthProbe.fit(model, tokenizer, 1, [(true, true) for true, _ in pairs])
    before = mean_residuals(model, conversation_batches(tokenizer, [true for true, _ in pairs]), 1)
    spread = (before @ probe.direction).std(ddof=1)
    shifts = axis_shifts(
        before, before + 2 * spread * probe.direction, {"truth": 5 * probe.direction, "none": before[0]}
    )
    assert shifts.loc[0, "shift"] == pytest.approx(2) and shifts["axis"].tolist() == ["truth", "none"]
    still = axis_shifts(before, before, {"truth": probe.direction})
    assert still[["shift", "ci_low", "ci_high"]].to_numpy().tolist() == [[0, 0, 0]]
    with pytest.raises(InputError, match="same ones"):
        axis_shifts(before, before[1:], {"truth": probe.direction})


def test_every_fact_has_two_answers_that_differ_in_few_words() -> None:
    assert len({asked for asked, _, _ in FACTS}) == len(FACTS) == len(fact_pairs()) == 24
    for _, true, false in FACTS:
        assert true != false and len(true.split()) - len(false.split()) in (-1, 0, 1)
        assert 1 <= len(set(true.split()) ^ set(false.split())) <= 4


# --- Planted truth


def test_every_tool_is_held_to_what_was_planted(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    small = DictionaryRecipe(d_sae=8, k=2, steps=40, batch=64)
    settings = BeyondSettings(2, (4.0,), ("lora", "no latent"), 0.0, 0.0, small, small)
    table = run_beyond(model, tokenizer, make_sae("topk"), ROWS, settings, progress=False, bf16=False)
    assert (
        table.groupby(["kind", "plant"])["tool"].agg(set).map(len).tolist()
        == [len(SIMPLE) + len(NEW)] * 2 + [len(SIMPLE) + len(NEW) - 1] * 2
    )
    assert (table["ten"] >= table["first"] - 1e-9).all() and table["first"].between(0, 1 + 1e-6).all()
    exact = table[table["tool"].isin(["mean difference", "weights"])]  # without noise both are the planted direction
    np.testing.assert_allclose(exact["first"], 1, atol=1e-3)
    text = beyond_text(table)
    assert "| weights | 1.00 (1.00, 2 of 2) | - |" in text and "difference dictionary" in text
    with pytest.raises(InputError, match="no planted directions"):
        beyond_text(pd.DataFrame())
    for wrong in ({"plants": 1}, {"sizes": (0.0,)}, {"kinds": ("nothing",)}):
        with pytest.raises(InputError):
            BeyondSettings(**wrong)  # pyright: ignore[reportArgumentType]


def test_directions_without_length_or_score_are_left_out() -> None:
    found = FoundDirections.ranked(np.array([[0.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), np.array([9.0, 1.0, -np.inf]))
    assert found.rows.tolist() == [[0.0, 1.0]] and found.scores.tolist() == [1.0]
