"""Several SAEs are located from the forward passes of one, with each SAE's own values; of any place in a layer."""

import logging
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import persona_probe as pp
from persona_probe.data.chat import conversation
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.latents.attribution import gradient_scores_of
from persona_probe.latents.rankers import RANKERS
from persona_probe.models.activation_cache import ActivationCache
from persona_probe.models.taps import read
from persona_probe.saes.hooks import placed_saes, write_place
from persona_probe.saes.read import FitMoments, add_fit, encode, read_saes
from tests.factories import hook_count, make_model, make_sae, make_tokenizer
from tests.several_saes import all_kinds, counted

TALKS = [conversation(f"Ask {n}?", side * (n + 2)) for n in range(4) for side in ("good. ", "bad! ")]
FLAGS = [False, True] * 4
SETTINGS: dict[str, Any] = {"minimum_explained_variance": -1e4, "misaligned": FLAGS, "rankers": list(RANKERS)}


def located(saes: Any, models: tuple[Any, Any], **options: Any) -> pd.DataFrame:
    return pp.locate(*models, saes, TALKS, tokenizer=make_tokenizer(), **{**SETTINGS, **options})


def test_the_table_of_several_is_the_tables_of_each_and_costs_the_passes_of_one() -> None:
    models, saes = (make_model(), make_model(seed=1)), all_kinds()
    del saes["normed"]  # has no slope
    with counted(models[0]) as base, counted(models[1]) as tuned:
        together = located(saes, models)
    for name, sae in saes.items():
        with counted(models[0]) as base_alone, counted(models[1]) as tuned_alone:
            alone = located(sae, models)
        assert (base, tuned) == (base_alone, tuned_alone)
        own = together[together["sae"] == name].drop(columns="sae").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, alone, check_exact=True)
        assert together.attrs["explained_variance"][name] == alone.attrs["explained_variance"]
    assert list(dict.fromkeys(together["sae"])) == list(saes) and together.columns[0] == "sae"
    assert hook_count(models[0]) == hook_count(models[1]) == 0


def test_a_normalised_stream_is_ranked_but_has_no_slope() -> None:
    models, saes = (make_model(), make_model(seed=1)), all_kinds()
    together = located(saes, models, rankers=["rise", "cosine"])
    own = together[together["sae"] == "normed"].drop(columns="sae").reset_index(drop=True)
    alone = located(saes["normed"], models, rankers=["rise", "cosine"])
    pd.testing.assert_frame_equal(own, alone, check_exact=True)
    with pytest.raises(InputError, match="cannot be pushed, so attribution and slope are not defined there"):
        located(saes, models)


def test_one_sae_has_no_column_and_a_list_of_one_has() -> None:
    models, sae = (make_model(), make_model(seed=1)), make_sae("topk")
    assert "sae" not in located(sae, models)
    assert set(located([sae], models)["sae"]) == {"L1"}
    with pytest.raises(InputError, match="one layer= cannot hold for several SAEs"):
        located([sae, sae], models, layer=1)


def test_a_worthless_fit_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        table = located({"a": make_sae("topk")}, (make_model(), make_model(seed=1)))
    warning = table.attrs["warnings"][0]
    assert warning.startswith("SAE a: explained variance 0.") and "worthless" in warning and warning in caplog.text
    with pytest.raises(InputError, match=r"explains -\d+\.\d+ of the variance of what the MLP adds .* in layer 1"):
        located(all_kinds()["mlp"], (make_model(), make_model()), minimum_explained_variance=0.5)


def test_a_cache_serves_every_place(tmp_path: Any) -> None:
    models, saes = (make_model(), make_model(seed=1)), all_kinds()
    cache = ActivationCache(tmp_path)
    first = located(saes, models, cache=cache, rankers=["rise"])
    misses = cache.misses
    again = located(saes, models, cache=cache, rankers=["rise"])
    assert cache.misses == misses == cache.hits > 0
    pd.testing.assert_frame_equal(first, again, check_exact=True)
    pd.testing.assert_frame_equal(first, located(saes, models, rankers=["rise"]), check_exact=True)


def test_latents_are_those_of_the_modules_own_activations() -> None:
    model, saes = make_model(), all_kinds()
    groups = conversation_batches(make_tokenizer(), TALKS)
    readings = read_saes(model, placed_saes(saes), groups, ("response",), bf16=False)
    for placed, reading in zip(placed_saes(saes), readings, strict=True):
        fit, rows = FitMoments(), np.zeros((len(TALKS), placed.sae.cfg.d_sae))
        for batch in groups:
            with torch.no_grad(), read(model, placed.reads) as seen, read(model, placed.writes) as target:
                model(input_ids=batch.ids, attention_mask=batch.attention)
            for row, index in enumerate(batch.index):
                chosen = batch.response[row].bool() & ~batch.special[row].bool()
                rows[index] = encode(placed.sae, seen.value[row][chosen]).mean(dim=0).numpy()
                add_fit(placed.sae, seen.value[row][chosen], fit, target.value[row][chosen])
        found = reading["response"]
        assert np.allclose(found.mean, rows, atol=1e-4), placed.name
        assert found.fit.explained_variance == pytest.approx(fit.explained_variance, rel=1e-4)


def test_the_slope_is_the_derivative_of_a_push_where_the_sae_writes() -> None:
    """The gradient in every place is that of pushing there, also where a lower place was cut."""
    model, saes = make_model().double(), all_kinds()
    for sae in saes.values():
        sae.to(torch.float64)
    groups = conversation_batches(make_tokenizer(), TALKS)
    del saes["normed"]  # cannot be pushed
    placed = placed_saes(saes)
    scores = gradient_scores_of(model, placed, groups, np.asarray(FLAGS), bf16=False)
    latent, step = 3, 1e-2  # norms work in float32: a smaller step is noise

    def contrast() -> float:
        total = 0.0
        for batch in groups:
            with torch.no_grad():
                logits = model(input_ids=batch.ids, attention_mask=batch.attention).logits
            taken = logits[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
            for row, index in enumerate(batch.index):
                answer = batch.response[row][1:].bool()
                total += float(taken[row][answer].mean()) * (1 if FLAGS[index] else -1) / 4
        return total

    for one, score in zip(placed, scores, strict=True):
        row = one.sae.W_dec[latent].detach()
        unit = row / row.norm()
        with pp.steer(model, write_place(one.sae), unit, step):
            up = contrast()
        with pp.steer(model, write_place(one.sae), unit, -step):
            down = contrast()
        assert score.slope[latent] == pytest.approx((up - down) / (2 * step), rel=5e-3, abs=1e-6), one.name
