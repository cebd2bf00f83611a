"""The table of scores: planted shifts come first, falls are marked, and missing evidence is named."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from persona_probe.errors import InputError
from persona_probe.latents.rankers import RANKERS, Evidence, agreement, discrimination, rank_table, score_table
from persona_probe.saes.read import FitMoments, LatentMeans
from persona_probe.stats import auroc

CONVERSATIONS, D_SAE, D_MODEL, DEAD = 24, 40, 6, 39
CLUSTERS = [f"q{n // 2}" for n in range(CONVERSATIONS)]
FLAGS = np.arange(CONVERSATIONS) % 2 == 0
DECODER = np.random.default_rng(7).normal(size=(D_SAE, D_MODEL))


def means(seed: int, shifts: dict[int, float] | None = None, along: int | None = None) -> LatentMeans:
    """Noisy readings, some latents shifted; the residual stream shifted along one latent's decoder row."""
    rng = np.random.default_rng(seed)
    values = rng.exponential(size=(CONVERSATIONS, D_SAE)).astype(np.float32)
    for latent, size in (shifts or {}).items():
        values[:, latent] = (values[:, latent] + size).clip(min=0)
    values[:, DEAD] = 0
    resid = 0.01 * rng.normal(size=(CONVERSATIONS, D_MODEL)) + (0 if along is None else 3 * DECODER[along])
    firing = (values > 1).astype(np.float32)
    return LatentMeans(values, firing, values.max(axis=0), resid.astype(np.float32), FitMoments())


def evidence(**changes: Any) -> Evidence:
    """Latent 5 rises on answers, 8 falls, 3 rises at the last prompt token; the mean difference is row 11."""
    tuned = {"response": means(2, {5: 4.0, 8: -3.0}, along=11), "last_prompt": means(4, {3: 4.0})}
    control = {"response": means(3), "last_prompt": means(5)}
    made = Evidence({"response": means(1, {5: 0.0})}, tuned, control, DECODER, CLUSTERS, FLAGS)
    return replace(made, **changes)


def best(table: Any, ranker: str) -> int:
    return int(table.set_index(f"{ranker}_rank")["latent"].loc[1])


def test_each_ranker_finds_what_was_planted_for_it() -> None:
    planted = {"rise": 5, "rise_response": 5, "firing_rise": 5, "rise_last_prompt": 3, "cosine": 11, "attribution": 21}
    table = score_table(evidence(attribution=np.eye(D_SAE)[21]), list(planted))
    assert {name: best(table, name) for name in planted} == planted
    assert table["rank"].tolist() == table["rise_rank"].tolist() == list(range(1, D_SAE + 1))
    assert (table["rise"] == table["rise_response"]).all()


def test_rises_and_falls_are_told_apart_and_the_dead_are_out() -> None:
    table = score_table(evidence()).set_index("latent")
    assert table.index[table["q_value"] <= 0.05].tolist() == [5, 8]
    assert table.index[table["suppressed"]].tolist() == [8]
    assert table.index[~table["alive"]].tolist() == [DEAD]
    assert table.loc[DEAD, "q_value"] == 1 and table.loc[DEAD, "rise"] == 0
    alive = table[table["alive"]]
    assert (alive["q_value"] >= alive["p_value"]).all()
    smallest = alive["p_value"].min()
    assert alive["q_value"].min() == pytest.approx(min(smallest * (D_SAE - 1), alive["p_value"].nlargest(1).iloc[0]))


def test_a_model_against_itself_is_no_evidence() -> None:
    same = {"response": means(1)}
    table = score_table(Evidence(same, same, same, DECODER, CLUSTERS))
    assert (table[["p_value", "q_value"]] == 1).all().all() and not table["suppressed"].any()
    assert (table[["rise", "firing_rise", "cosine", "rise_base"]] == 0).all().all()


def test_rank_table_is_the_score_table_of_one_reading() -> None:
    made = evidence()
    plain = rank_table(made.at("base"), made.at("tuned"), made.at("control"), DECODER, CLUSTERS)
    one = {name: {"response": made.at(name)} for name in ("base", "tuned", "control")}
    whole = score_table(Evidence(one["base"], one["tuned"], one["control"], DECODER, CLUSTERS))
    assert plain.equals(whole[plain.columns])


def test_discrimination_is_the_auroc_of_each_latent() -> None:
    values = np.random.default_rng(0).integers(0, 4, size=(CONVERSATIONS, 9)).astype(np.float32)
    values[:, 0], values[:, 1], values[:, 2] = 2.0, FLAGS, ~FLAGS
    wanted = [auroc(column[FLAGS], column[~FLAGS]) for column in values.T]
    assert discrimination(values, FLAGS) == pytest.approx(wanted)
    assert wanted[:3] == [0.5, 1.0, 0.0]


def test_discrimination_looks_at_the_base_model_only() -> None:
    made = evidence()
    told = made.at("base").mean.copy()
    told[FLAGS, 30] += 50
    base = {"response": replace(made.at("base"), mean=told)}
    table = score_table(replace(made, base=base), ["discrimination"])
    assert best(table, "discrimination") == 30
    assert table.set_index("latent").loc[30, "discrimination"] == 1


@pytest.mark.parametrize(
    ("changes", "ranker", "message"),
    [
        ({}, "rize", "unknown ranker 'rize': did you mean 'rise'"),
        ({}, "attribution", "needs a backward pass: give the result of latents.attribution.gradient_scores"),
        ({"attribution": np.zeros(3)}, "attribution", r"shape \(3,\), the SAE 40 latents"),
        ({"attribution": np.full(D_SAE, np.nan)}, "attribution", "40 of 40 scores not finite"),
        ({"misaligned": None}, "discrimination", "which answers are misaligned: give Evidence.misaligned"),
        ({"misaligned": FLAGS | True}, "discrimination", "all 24 conversations end with misaligned answers"),
        ({}, "rise_prompt", "tuned was not read at positions 'prompt' .only 'response', 'last_prompt'.: read them too"),
    ],
)
def test_missing_evidence_is_named(changes: dict[str, Any], ranker: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_table(evidence(**changes), [ranker])


def test_evidence_that_does_not_belong_together_is_refused() -> None:
    half = means(3)
    short = LatentMeans(half.mean[:8], half.firing[:8], half.maximum, half.resid[:8], half.fit)
    with pytest.raises(InputError, match="tuned was read on 24 conversations x 40 latents, control on 8 conv"):
        evidence(control={"response": short})
    with pytest.raises(InputError, match="clusters and decoder have 24 conversations x 7 latents"):
        evidence(decoder=DECODER[:7])
    with pytest.raises(InputError, match="tuned was not read at positions 'all'"):
        evidence(positions="all")


def test_every_ranker_names_its_source() -> None:
    assert all(name == r.name and r.what and any(c.isdigit() for c in r.paper) for name, r in RANKERS.items())
    full = evidence(attribution=np.zeros(D_SAE), slope=np.zeros(D_SAE))
    full = replace(full, tuned={**full.tuned, "prompt": means(6)}, control={**full.control, "prompt": means(7)})
    table = score_table(full, list(RANKERS))
    assert {column for name in RANKERS for column in (name, f"{name}_rank")} <= set(table.columns)


def test_agreement_counts_shared_tops_and_rank_correlation() -> None:
    table = score_table(evidence(attribution=-np.arange(D_SAE, dtype=float)), ["rise", "rise_response", "attribution"])
    table["opposite"], table["opposite_rank"] = -table["rise"], table["rise"].rank(method="first").astype(int)
    found = agreement(table, ["rise", "rise_response", "opposite"], top=10)
    assert found[["left", "right"]].to_numpy().tolist()[:2] == [["rise", "rise_response"], ["rise", "opposite"]]
    assert found["shared"].to_list() == [10, 0, 0] and found["share"].to_list() == [1.0, 0.0, 0.0]
    assert found["spearman"].to_list() == pytest.approx([1.0, -1.0, -1.0])
    assert (found["chance"] == 10 / 39).all() and (found["alive"] == 39).all() and len(found) == 3
    every = agreement(table, ["rise", "opposite"], top=1000)
    assert every[["top", "shared"]].to_numpy().tolist() == [[39, 39]]


def test_agreement_refuses_what_it_cannot_compare() -> None:
    table = score_table(evidence())
    with pytest.raises(InputError, match=r"unknown ranker of this table 'risen'.*'rise'"):
        agreement(table, ["risen", "cosine"])
    with pytest.raises(InputError, match="at least two rankers: got 1"):
        agreement(table, ["rise", "rise"])
    with pytest.raises(InputError, match="no latent fires"):
        agreement(table.assign(alive=False), ["rise", "cosine"])
