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
from persona_probe.latents.planted.plant import Baseline, Plant, PlantReading, disturbance, make_plants, measure
from persona_probe.latents.planted.planted_run import (
    CausalTest,
    carried,
    discoveries,
    named_latents,
    planted_ranks,
    random_pushes,
    recalls,
    score_plant,
    unit_rows,
)
from persona_probe.saes.read import read_latents
from tests.factories import LAYER, make_model, make_tokenizer
from tests.latents.planting import ROWS, tiny_baseline

VECTOR = torch.zeros(32)


def plant_of(baseline: Baseline, kind: str, size: float = 2.0, seed: int = 0) -> Plant:
    return make_plants(
        kind, [size], baseline.stream, baseline.decoder, baseline.pools, torch.Generator().manual_seed(seed)
    )[0]


def clean(baseline: Baseline, plant: Plant) -> PlantReading:
    """Measured without any disturbance, against the base itself."""
    return measure(baseline, plant, torch.zeros_like(baseline.stream.resid), baseline.base)


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
    baseline = tiny_baseline("topk")
    conversations = [conversation(row["question"], row[side]) for row in ROWS for side in ("aligned", "misaligned")]
    groups = conversation_batches(make_tokenizer(), conversations)
    direct = read_latents(make_model(), baseline.sae, groups, LAYER, "response", bf16=False)
    assert np.allclose(baseline.base.mean, direct.mean, atol=1e-4)
    assert np.allclose(baseline.base.firing, direct.firing, atol=1e-6)
    assert np.allclose(baseline.base.resid, direct.resid, atol=1e-4)


@pytest.mark.parametrize("architecture", ["standard", "topk"])
@pytest.mark.parametrize("kind", ["latent", "lora"])
def test_a_large_plant_without_noise_is_found_and_caused(architecture: str, kind: str) -> None:
    baseline = tiny_baseline(architecture)
    plant = plant_of(baseline, kind)
    reading = clean(baseline, plant)
    assert all(row["recall_1"] == 1 for row in score_plant(baseline, plant, reading))
    counts = discoveries(baseline, plant, reading)
    assert counts["discoveries"] >= 1 and counts["false_share"] == 0
    assert np.allclose(reading.table["rise"].to_numpy(), baseline.caused(plant), atol=1e-4)
    verdict = carried(baseline, plant, reading)
    assert (verdict["carried"], verdict["carriers_right"]) == (1, 1)
    assert verdict["unexplained"] == pytest.approx(0, abs=1e-4) and verdict["removed"] == pytest.approx(1, abs=1e-4)


def test_what_the_plant_did_not_do_is_a_false_discovery() -> None:
    baseline = tiny_baseline()
    truth, nothing = plant_of(baseline, "latent"), plant_of(baseline, "nothing")
    seen = clean(baseline, truth)
    counts = discoveries(baseline, nothing, seen)
    assert counts["discoveries"] >= 1 and counts["false_share"] == 1 and counts["off_target"] == 0
    assert np.isnan(counts["significant"])
    quiet = discoveries(baseline, nothing, clean(baseline, nothing))
    assert quiet["discoveries"] == 0 and quiet["false_share"] == 0


def test_falls_are_no_discoveries_and_count_for_latents_pushed_down() -> None:
    baseline = tiny_baseline()
    latent = int(np.argmax(baseline.base_means))
    vector = -baseline.decoder[latent] * baseline.stream.sd
    plant = Plant("latents", 1.0, (latent,), (-1,), vector)
    reading = clean(baseline, plant)
    assert reading.table["rise"].to_numpy()[latent] < 0
    assert discoveries(baseline, plant, reading)["significant"] == 1
    assert recalls(reading.table["rise"].to_numpy(), plant)["recall_k"] == 1
    upside_down = replace(plant, signs=(1,))
    assert discoveries(baseline, upside_down, reading)["significant"] == 0


def test_off_target_discoveries_are_the_true_ones_far_from_the_plant() -> None:
    baseline = tiny_baseline()
    plant = plant_of(baseline, "latent")
    caused = baseline.caused(plant)
    cosine = (baseline.decoder @ baseline.decoder[plant.latents[0]]).numpy()
    chosen = caused > 0
    table = pd.DataFrame({"rise": caused, "q_value": np.where(chosen, 0.01, 1.0)})
    counts = discoveries(baseline, plant, PlantReading(table, np.zeros(32)))
    assert counts["false_share"] == 0
    assert counts["off_target"] == pytest.approx((chosen & (cosine < 0.2)).sum() / chosen.sum())
    assert 0 < counts["off_target"] < 1


def test_a_direction_that_no_latent_has_is_reported_as_such() -> None:
    baseline = tiny_baseline()
    plant = plant_of(baseline, "no latent")
    reading = clean(baseline, plant)
    direction = plant.vector.numpy() / np.linalg.norm(plant.vector.numpy())
    assert np.allclose(reading.difference / np.linalg.norm(reading.difference), direction, atol=1e-4)
    verdict = carried(baseline, plant, reading)
    assert verdict["carried"] == 0 and verdict["unexplained"] > 0.1
    assert np.isnan(verdict["carriers_right"])


def causal_test() -> CausalTest:
    conversations = [conversation(row["question"], row[side]) for row in ROWS for side in ("aligned", "misaligned")]
    clusters = [row["id"] for row in ROWS for _ in range(2)]
    return CausalTest(make_model(), LAYER, answer_batches(make_tokenizer(), conversations), clusters)


@pytest.mark.parametrize("kind", ["latent", "latents", "lora"])
def test_steering_back_along_the_planted_latent_restores_the_base(kind: str) -> None:
    baseline = tiny_baseline()
    plant = plant_of(baseline, kind)
    reading = clean(baseline, plant)
    truth = pd.Series(0.0, index=reading.table.index)
    truth[plant.up()], truth[plant.down()] = 1.0, -1.0
    known = PlantReading(reading.table.assign(rise=truth), reading.difference)
    assert set(named_latents(plant, known)) == set(plant.latents)
    result = causal_test().restore(baseline, plant, known, torch.Generator().manual_seed(0))
    assert result.restored > result.restored_random
    if kind == "latent":
        assert result.restored == pytest.approx(1, abs=1e-3) and result.confirmed


def test_steering_back_along_a_wrong_latent_is_not_confirmed() -> None:
    baseline = tiny_baseline()
    plant = plant_of(baseline, "latent")
    reading = clean(baseline, plant)
    wrong = int((baseline.decoder @ plant.vector).abs().argmin())
    table = reading.table.assign(rise=(reading.table.index == wrong).astype(float))
    result = causal_test().restore(
        baseline, plant, PlantReading(table, reading.difference), torch.Generator().manual_seed(0)
    )
    assert not result.confirmed and result.restored < 0.5


def test_random_pushes_are_as_hard_and_leave_the_found_latents_out() -> None:
    baseline = tiny_baseline()
    first, second, third = baseline.pools["frequent"][:3]
    small = copy(baseline)
    small.pools = {"frequent": [first, second, third]}
    reading = PlantReading(pd.DataFrame({"rise": np.zeros(64)}), (7.0 * baseline.decoder[first]).numpy())
    for push in random_pushes(small, [first], reading, torch.Generator().manual_seed(0)):
        assert any(torch.allclose(push, -7.0 * unit_rows(baseline, [i])[0], atol=1e-4) for i in (second, third))
    with pytest.raises(InputError, match="set causal to 0"):
        random_pushes(small, [first, second], reading, torch.Generator())


def test_noise_alone_is_rarely_discovered() -> None:
    baseline = tiny_baseline("topk")
    shares = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        ours, theirs = (disturbance(baseline.stream, generator, 1.0, 0.0) for _ in range(2))
        nothing = plant_of(baseline, "nothing")
        reading = measure(baseline, nothing, ours, baseline.read(baseline.stream.resid + theirs))
        shares.append(discoveries(baseline, nothing, reading)["false_share"])
    assert np.mean(shares) <= 0.15
