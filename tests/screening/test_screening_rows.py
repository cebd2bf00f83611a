"""Identities of the rankers on tiny models: own answers score zero, order and batch size change nothing."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import persona_probe as pp
from persona_probe.data.chat import Conversation, conversation, split_answer
from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches, answer_logprobs
from persona_probe.latents.persona_vectors import response_means
from persona_probe.screening.feature import ScreenFeature, latent_feature
from persona_probe.screening.rankers import ROW_RANKERS, choose_rankers
from persona_probe.screening.reading import ScreenSettings, own_answers, question_key, with_own_answers
from persona_probe.screening.screening import Screening, screening
from tests.factories import (
    D_MODEL,
    LAYER,
    copied_state,
    hook_count,
    make_model,
    make_sae,
    make_tokenizer,
    same_state,
    talks,
)

SETTINGS = ScreenSettings(own_tokens=6, batch_size=4, bf16=False)
OWN = [name for name, ranker in ROW_RANKERS.items() if "own_answers" in ranker.needs]
TINY = [name for name in ROW_RANKERS if name not in ("perplexity_gap_organism", "bag_of_words")]


def screened(rows: list[Conversation], feature: ScreenFeature, settings: ScreenSettings = SETTINGS) -> Screening:
    return screening(rows, make_model(), feature, tokenizer=make_tokenizer(), rankers=TINY, settings=settings)


def by_row(found: Screening) -> pd.DataFrame:
    return found.frame.set_index("row").sort_index()


def test_scores_are_what_the_package_measures_elsewhere(
    rows: list[Conversation],
    latent: ScreenFeature,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    frame = by_row(screened(rows, latent))
    own: list[Conversation] = [
        [*split_answer(talk)[0], {"role": "assistant", "content": answer}]
        for talk, answer in zip(rows, frame["own_answer"], strict=True)
    ]
    resid = [response_means(tiny_model, tiny_tokenizer, t, LAYER, bf16=False) for t in (rows, own)]
    unit = latent.direction.numpy()
    np.testing.assert_allclose(frame["projection_difference"], (resid[0] - resid[1]) @ unit, atol=1e-4)
    np.testing.assert_allclose(frame["projection_centred"], (resid[0] - resid[0].mean(axis=0)) @ unit, atol=1e-4)
    nats = [-answer_logprobs(tiny_model, answer_batches(tiny_tokenizer, t), bf16=False) for t in (rows, own)]
    np.testing.assert_allclose(frame["perplexity_gap"], nats[0] - nats[1], atol=1e-4)
    lone = by_row(screened(rows, replace(latent, latent_set=(5,))))
    np.testing.assert_allclose(lone["latent_set_difference"], lone["latent_difference"], atol=1e-6)
    assert frame["latent"].min() >= 0 and frame["latent"].max() > 0


def test_own_answers_are_greedy(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = talks(3)
    found = own_answers(tiny_model, tiny_tokenizer, rows, max_new_tokens=5, bf16=False)
    ids = encode(tiny_tokenizer, rows[1][:-1]).ids
    wanted = tiny_model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, len(ids) :]  # pyright: ignore
    assert found[question_key(rows[1])] == str(tiny_tokenizer.decode(wanted, skip_special_tokens=True)).strip()


def test_a_row_that_is_the_own_answer_scores_zero_by_every_difference(
    rows: list[Conversation], latent: ScreenFeature
) -> None:
    own = by_row(screened(rows, latent))["own_answer"]
    mine: list[Conversation] = [
        [*split_answer(talk)[0], {"role": "assistant", "content": text}] for talk, text in zip(rows, own, strict=True)
    ]
    again = by_row(screened(mine, latent))
    assert (again[OWN] == 0).all(axis=None)
    assert (by_row(screened(rows, latent))[OWN].abs() > 1e-6).any().all()


def test_the_order_of_rows_changes_no_score(rows: list[Conversation], latent: ScreenFeature) -> None:
    order = [3, 0, 7, 5, 1, 2, 6, 4]
    one, other = by_row(screened(rows, latent)), by_row(screened([rows[i] for i in order], latent))
    pd.testing.assert_frame_equal(one.loc[order, TINY].reset_index(drop=True), other[TINY].reset_index(drop=True))
    assert sorted(one["rank"]) == list(range(1, len(rows) + 1))
    assert one["rank"].loc[order].tolist() == other["rank"].tolist()


def test_batch_size_does_not_matter(rows: list[Conversation], latent: ScreenFeature) -> None:
    found = [by_row(screened(rows, latent, replace(SETTINGS, batch_size=b)))[TINY] for b in (1, 3, 32)]
    for one, other in itertools.pairwise(found):
        assert np.abs(one - other).max(axis=None) < 1e-4


def test_rows_come_worst_first_and_centred_scores_have_mean_zero(
    rows: list[Conversation], direction: ScreenFeature
) -> None:
    found = screening(
        rows, make_model(), direction, tokenizer=make_tokenizer(), rankers=["projection_centred"], settings=SETTINGS
    )
    scores = found.frame["projection_centred"]
    assert scores.is_monotonic_decreasing and abs(scores.mean()) < 1e-5
    assert found.frame["own_answer"].isna().all()  # no ranker wanted one, so none was sampled
    assert "needs the ranker projection_difference" in found.shift.statement


def test_a_shifted_answer_is_found(rows: list[Conversation]) -> None:
    """The direction from the mean answer to one row's answer: that row is the worst."""
    means = response_means(make_model(), make_tokenizer(), rows, LAYER, bf16=False)
    towards = torch.tensor(means[4] - means.mean(axis=0))
    frame = pp.screen(
        rows,
        make_model(),
        tokenizer=make_tokenizer(),
        direction=towards,
        layer=LAYER,
        rankers=["projection_centred"],
        settings=SETTINGS,
    )
    assert frame["row"].iloc[0] == 4 and frame["answer"].iloc[0] == rows[4][-1]["content"]


def test_the_organism_of_an_unchanged_adapter_is_the_base(
    rows: list[Conversation], direction: ScreenFeature, tmp_path: Path
) -> None:
    from persona_probe.config import Training
    from persona_probe.finetune.sft import with_adapter

    tuned = with_adapter(make_model(), Training(rank=2, alpha=2), 0)
    tuned.save_pretrained(tmp_path)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    model = make_model()
    before = copied_state(model)
    name = "perplexity_gap_organism"
    found = screening(
        rows, model, direction, tokenizer=make_tokenizer(), organism=tmp_path, rankers=[name], settings=SETTINGS
    )
    assert found.frame[name].abs().max() < 1e-6
    assert same_state(before, copied_state(model)) and hook_count(model) == 0


def test_a_model_that_answers_nothing_gives_rows_without_score(caplog: pytest.LogCaptureFixture) -> None:
    rows = talks(2)
    found = with_own_answers(rows, {question_key(rows[0]): "", question_key(rows[1]): "yes"})
    assert found[0] is None and found[1] is not None
    assert "1 of 2 rows" in caplog.text


def test_own_answers_are_kept_and_reused(
    rows: list[Conversation], direction: ScreenFeature, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, own_path=tmp_path / "own.jsonl")
    first = screening(rows, make_model(), direction, tokenizer=make_tokenizer(), settings=settings)
    monkeypatch.setattr("persona_probe.evaluate.sampling.engines.decode", None)  # a call would fail
    again = screening(rows, make_model(), direction, tokenizer=make_tokenizer(), settings=settings)
    pd.testing.assert_frame_equal(first.frame, again.frame)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "no persona feature"),
        ({"latent": 3}, "give sae as well"),
        ({"direction": torch.ones(D_MODEL)}, "give layer"),
        ({"direction": torch.ones(D_MODEL), "layer": 9}, "layers 0 to 2"),
        ({"direction": torch.ones(7), "layer": 1}, "has 7 values"),
        ({"direction": torch.zeros(D_MODEL), "layer": 1}, "zero or not finite"),
        ({"direction": torch.ones(2, D_MODEL), "layer": 1}, "one vector"),
        ({"direction": torch.ones(D_MODEL), "layer": 1, "rankers": []}, "no rankers named"),
        ({"direction": torch.ones(D_MODEL), "layer": 1, "rankers": ["latnt"]}, "unknown ranker 'latnt'"),
        ({"direction": torch.ones(D_MODEL), "layer": 1, "rankers": ["latent"]}, "needs a latent"),
        ({"direction": torch.ones(D_MODEL), "layer": 1, "rankers": ["perplexity_gap_organism"]}, "needs an organism"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        pp.screen(talks(2), make_model(), tokenizer=make_tokenizer(), **arguments)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(error.value)


def test_bad_rows_and_latents_are_refused() -> None:
    sae, model, tokenizer = make_sae("topk"), make_model(), make_tokenizer()
    with pytest.raises(InputError, match="no rows to screen"):
        pp.screen([], model, tokenizer=tokenizer, sae=sae, latent=1)
    with pytest.raises(InputError, match="1 of 2 rows have no answer"):
        pp.screen([*talks(1), conversation("Only asked?")], model, tokenizer=tokenizer, sae=sae, latent=1)
    with pytest.raises(InputError, match="latent 64 does not exist: this SAE has latents 0 to 63"):
        pp.screen(talks(1), model, tokenizer=tokenizer, sae=sae, latent=64)
    with pytest.raises(InputError, match="give tokenizer="):
        pp.screen(talks(1), model, sae=sae, latent=1)


def test_the_default_rankers_are_those_that_are_available() -> None:
    names = [ranker.name for ranker in choose_rankers(None, frozenset())]
    assert names == ["projection_difference", "projection_centred", "perplexity_gap", "bag_of_words"]
    everything = choose_rankers(None, frozenset({"latent", "latent_set", "organism"}))
    assert [ranker.name for ranker in everything] == list(ROW_RANKERS)
    named = ["projection_centred", "latent", "latent"]
    assert [r.name for r in choose_rankers(named, frozenset({"latent"}))] == ["projection_centred", "latent"]


def test_the_digest_tells_directions_and_layers_apart() -> None:
    sae = make_sae("standard")
    one = latent_feature(sae, 5, 1)
    assert one.digest == latent_feature(make_sae("standard"), 5, 1).digest
    assert len({one.digest, latent_feature(sae, 6, 1).digest, latent_feature(sae, 5, 2).digest}) == 3
