"""One plant measured: known answers for recall, false discoveries, carriers and the causal test."""

from copy import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from persona_probe.data.chat import conversation
from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.evaluate.answers import answer_batches
from persona_probe.latents.planted.plant import Bed, Found, Plant, disturbance, make_plants, measure
from persona_probe.latents.planted.run import (
    CausalBed,
    carried,
    discoveries,
    found_latents,
    planted_ranks,
    random_pushes,
    recalls,
    scores,
    unit_rows,
)
from persona_probe.saes.read import read_latents
from tests.factories import LAYER, make_model, make_tokenizer
from tests.latents.planting import ROWS, tiny_bed

VECTOR = torch.zeros(32)


def plant_of(bed: Bed, kind: str, size: float = 2.0, seed: int = 0) -> Plant:
    return make_plants(kind, [size], bed.stream, bed.decoder, bed.pools, torch.Generator().manual_seed(seed))[0]


def clean(bed: Bed, plant: Plant) -> Found:
    """Measured without any disturbance, against the base itself."""
    return measure(bed, plant, torch.zeros_like(bed.stream.resid), bed.base)


def test_recalls_by_hand() -> None:
    score = np.array([5.0, 4.0, 3.0, 2.0, 1.0, -1.0])
    plant = Plant("latents", 0.5, (0, 2, 5), (1, 1, -1), VECTOR)
    assert planted_ranks(score, plant) == ([1, 3], [1])
    assert recalls(score, plant) == {"recall_1": 1.0, "recall_k": pytest.approx(2 / 3), "recall_10": 1.0}
    second = Plant("latent", 0.5, (1,), (1,), VECTOR)
    assert recalls(score, second) == {"recall_1": 0.0, "recall_k": 0.0, "recall_10": 1.0}
    assert recalls(score, Plant("latent", 0.5, (5,), (-1,), VECTOR))["recall_1"] == 1.0
    assert np.isnan(list(recalls(score, Plant("nothing", 0.0, (), (), VECTOR)).values())).all()


def test_ties_count_against_the_planted_latent() -> None:
    flat = np.zeros(64)
    assert recalls(flat, Plant("latent", 0.5, (0,), (1,), VECTOR)) == {"recall_1": 0, "recall_k": 0, "recall_10": 0}


def test_the_bed_reads_what_read_latents_reads() -> None:
    bed = tiny_bed("topk")
    talks = [conversation(row["question"], row[side]) for row in ROWS for side in ("aligned", "misaligned")]
    groups = conversation_batches(make_tokenizer(), talks)
    direct = read_latents(make_model(), bed.sae, groups, LAYER, "response", bf16=False)
    assert np.allclose(bed.base.mean, direct.mean, atol=1e-4)
    assert np.allclose(bed.base.firing, direct.firing, atol=1e-6)
    assert np.allclose(bed.base.resid, direct.resid, atol=1e-4)


@pytest.mark.parametrize("architecture", ["standard", "topk"])
@pytest.mark.parametrize("kind", ["latent", "lora"])
def test_a_large_plant_without_noise_is_found_and_caused(architecture: str, kind: str) -> None:
    bed = tiny_bed(architecture)
    plant = plant_of(bed, kind)
    found = clean(bed, plant)
    assert all(row["recall_1"] == 1 for row in scores(bed, plant, found))
    told = discoveries(bed, plant, found)
    assert told["discoveries"] >= 1 and told["false_share"] == 0
    assert np.allclose(found.table["rise"].to_numpy(), bed.caused(plant), atol=1e-4)
    verdict = carried(bed, plant, found)
    assert (verdict["carried"], verdict["carriers_right"]) == (1, 1)
    assert verdict["unexplained"] == pytest.approx(0, abs=1e-4) and verdict["removed"] == pytest.approx(1, abs=1e-4)


def test_what_the_plant_did_not_do_is_a_false_discovery() -> None:
    bed = tiny_bed()
    truth, nothing = plant_of(bed, "latent"), plant_of(bed, "nothing")
    seen = clean(bed, truth)
    told = discoveries(bed, nothing, seen)
    assert told["discoveries"] >= 1 and told["false_share"] == 1 and told["off_target"] == 0
    assert np.isnan(told["significant"])
    quiet = discoveries(bed, nothing, clean(bed, nothing))
    assert quiet["discoveries"] == 0 and quiet["false_share"] == 0


def test_falls_are_no_discoveries_and_count_for_latents_pushed_down() -> None:
    bed = tiny_bed()
    latent = int(np.argmax(bed.base_means))
    vector = -bed.decoder[latent] * bed.stream.sd
    plant = Plant("latents", 1.0, (latent,), (-1,), vector)
    found = clean(bed, plant)
    assert found.table["rise"].to_numpy()[latent] < 0
    assert discoveries(bed, plant, found)["significant"] == 1
    assert recalls(found.table["rise"].to_numpy(), plant)["recall_k"] == 1
    upside_down = replace(plant, signs=(1,))
    assert discoveries(bed, upside_down, found)["significant"] == 0


def test_off_target_discoveries_are_the_true_ones_far_from_the_plant() -> None:
    bed = tiny_bed()
    plant = plant_of(bed, "latent")
    caused = bed.caused(plant)
    cosine = (bed.decoder @ bed.decoder[plant.latents[0]]).numpy()
    chosen = caused > 0
    table = pd.DataFrame({"rise": caused, "q_value": np.where(chosen, 0.01, 1.0)})
    told = discoveries(bed, plant, Found(table, np.zeros(32)))
    assert told["false_share"] == 0
    assert told["off_target"] == pytest.approx((chosen & (cosine < 0.2)).sum() / chosen.sum())
    assert 0 < told["off_target"] < 1


def test_a_direction_that_no_latent_has_is_reported_as_such() -> None:
    bed = tiny_bed()
    plant = plant_of(bed, "no latent")
    found = clean(bed, plant)
    direction = plant.vector.numpy() / np.linalg.norm(plant.vector.numpy())
    assert np.allclose(found.difference / np.linalg.norm(found.difference), direction, atol=1e-4)
    verdict = carried(bed, plant, found)
    assert verdict["carried"] == 0 and verdict["unexplained"] > 0.1
    assert np.isnan(verdict["carriers_right"])


def causal_bed() -> CausalBed:
    talks = [conversation(row["question"], row[side]) for row in ROWS for side in ("aligned", "misaligned")]
    clusters = [row["id"] for row in ROWS for _ in range(2)]
    return CausalBed(make_model(), LAYER, answer_batches(make_tokenizer(), talks), clusters)


@pytest.mark.parametrize("kind", ["latent", "latents", "lora"])
def test_steering_back_along_the_planted_latent_restores_the_base(kind: str) -> None:
    bed = tiny_bed()
    plant = plant_of(bed, kind)
    found = clean(bed, plant)
    truth = pd.Series(0.0, index=found.table.index)
    truth[plant.up()], truth[plant.down()] = 1.0, -1.0
    known = Found(found.table.assign(rise=truth), found.difference)
    assert set(found_latents(plant, known)) == set(plant.latents)
    result = causal_bed().repair(bed, plant, known, torch.Generator().manual_seed(0))
    assert result.restored > result.restored_random
    if kind == "latent":
        assert result.restored == pytest.approx(1, abs=1e-3) and result.confirmed


def test_steering_back_along_a_wrong_latent_is_not_confirmed() -> None:
    bed = tiny_bed()
    plant = plant_of(bed, "latent")
    found = clean(bed, plant)
    wrong = int((bed.decoder @ plant.vector).abs().argmin())
    table = found.table.assign(rise=(found.table.index == wrong).astype(float))
    result = causal_bed().repair(bed, plant, Found(table, found.difference), torch.Generator().manual_seed(0))
    assert not result.confirmed and result.restored < 0.5


def test_random_pushes_are_as_hard_and_leave_the_found_latents_out() -> None:
    bed = tiny_bed()
    first, second, third = bed.pools["frequent"][:3]
    small = copy(bed)
    small.pools = {"frequent": [first, second, third]}
    found = Found(pd.DataFrame({"rise": np.zeros(64)}), (7.0 * bed.decoder[first]).numpy())
    for push in random_pushes(small, [first], found, torch.Generator().manual_seed(0)):
        assert any(torch.allclose(push, -7.0 * unit_rows(bed, [i])[0], atol=1e-4) for i in (second, third))
    with pytest.raises(InputError, match="set causal to 0"):
        random_pushes(small, [first, second], found, torch.Generator())


def test_noise_alone_is_rarely_discovered() -> None:
    bed = tiny_bed("topk")
    shares = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        ours, theirs = (disturbance(bed.stream, generator, 1.0, 0.0) for _ in range(2))
        nothing = plant_of(bed, "nothing")
        found = measure(bed, nothing, ours, bed.read(bed.stream.resid + theirs))
        shares.append(discoveries(bed, nothing, found)["false_share"])
    assert np.mean(shares) <= 0.15
