"""Plants: arithmetic on the stream equals the plant in the model, and sizes are what they say."""

from collections.abc import Sequence

import pytest
import torch

from persona_probe.data.tokens import conversation_batches
from persona_probe.errors import InputError
from persona_probe.latents.planted.plant import (
    KINDS,
    Plant,
    Stream,
    disturbance,
    draw_latents,
    graft,
    make_plants,
    pools,
    read_stream,
    uncarried_direction,
)
from persona_probe.models.residuals import read_residuals
from tests.factories import LAYER, copied_state, hook_count, make_model, make_tokenizer, same_state
from tests.latents.planting import ROWS, tiny_baseline, tiny_stream

ALL = tuple(KINDS)
POOLS = {"frequent": list(range(40)), "rare": [40, 41, 42]}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plants(kind: str, stream: Stream, sizes: Sequence[float] = (0.5, 2.0), seed: int = 0) -> list[Plant]:
    baseline = tiny_baseline()
    return make_plants(kind, sizes, stream, baseline.decoder, POOLS, generator(seed))


def test_the_stream_is_what_read_residuals_gives() -> None:
    stream = tiny_stream()
    conversations = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row[side]}]
        for row in ROWS
        for side in ("aligned", "misaligned")
    ]
    seen: dict[int, torch.Tensor] = {}

    def visit(index: list[int], row: torch.Tensor, x: torch.Tensor) -> None:
        seen.update({talk: x[row == place] for place, talk in enumerate(index)})

    read_residuals(make_model(), conversation_batches(make_tokenizer(), conversations), LAYER, "response", visit, False)
    for talk, resid in seen.items():
        assert torch.allclose(stream.resid[stream.conversation == talk], resid, atol=1e-4)
    assert stream.misaligned.tolist() == [False, True] * len(ROWS)
    assert stream.clusters[:3] == ("q0", "q0", "q1")


def test_one_residual_standard_deviation() -> None:
    stream = tiny_stream()
    width = stream.resid.shape[1]
    directions = torch.randn(4000, width, generator=generator())
    directions /= directions.norm(dim=1, keepdim=True)
    along = (stream.resid @ directions.T).var(dim=0).mean().sqrt()
    assert stream.sd == pytest.approx(float(along), rel=0.05)
    means = stream.conversation_means(stream.resid)
    assert torch.allclose(stream.weights @ stream.resid, means.mean(dim=0), atol=1e-4)
    assert float(stream.weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "nothing"])
def test_arithmetic_equals_the_plant_in_the_model(architecture: str, kind: str) -> None:
    model = make_model(architecture)
    before, stream = copied_state(model), tiny_stream(model)
    plant = plants(kind, stream)[1]
    with graft(model, LAYER, plant):
        planted = tiny_stream(model)
    moved = planted.resid - stream.resid
    assert torch.allclose(moved, plant.shift(stream), atol=1e-3)
    assert moved.norm() > 1
    assert same_state(before, copied_state(model)) and hook_count(model) == 0


@pytest.mark.parametrize("kind", ["latent", "lora"])
def test_a_graft_leaves_nothing_behind_after_an_error(kind: str) -> None:
    model = make_model()
    before, plant = copied_state(model), plants(kind, tiny_stream())[0]
    with pytest.raises(RuntimeError, match="stop"), graft(model, LAYER, plant):
        raise RuntimeError("stop")
    assert same_state(before, copied_state(model)) and hook_count(model) == 0


@pytest.mark.parametrize("kind", ["latent", "rare latent", "lora", "no latent"])
@pytest.mark.parametrize("size", [0.125, 2.0])
def test_the_mean_shift_has_the_size_asked_for(kind: str, size: float) -> None:
    stream, baseline = tiny_stream(), tiny_baseline()
    plant = plants(kind, stream, [size])[0]
    mean = stream.weights @ plant.shift(stream)
    assert float(mean.norm()) == pytest.approx(size * stream.sd, rel=1e-3)
    target = plant.targets(baseline.decoder)[0]
    assert float(mean @ target / mean.norm()) == pytest.approx(1, abs=1e-4)


def test_several_latents_have_their_own_sizes_and_signs() -> None:
    stream, baseline = tiny_stream(), tiny_baseline()
    signs = set()
    for seed in range(4):
        plant = plants("latents", stream, [0.5], seed)[0]
        assert len(set(plant.latents)) == 5 and set(plant.up()) | set(plant.down()) == set(plant.latents)
        rows = baseline.decoder[list(plant.latents)]
        wanted = sum(s * r / r.norm() for s, r in zip(plant.signs, rows, strict=True)) * 0.5 * stream.sd
        assert torch.allclose(plant.vector, torch.as_tensor(wanted), atol=1e-5)
        signs |= set(plant.signs)
    assert signs == {1, -1}


def test_a_planted_lora_differs_from_token_to_token_and_a_shift_does_not() -> None:
    stream = tiny_stream()
    assert float(plants("lora", stream)[0].shift(stream).norm(dim=1).std()) > 0.1
    assert float(plants("latent", stream)[0].shift(stream).norm(dim=1).std()) < 1e-6


def test_a_direction_that_no_latent_has() -> None:
    half = torch.eye(32)[:16]
    assert float((half @ uncarried_direction(half, generator())).abs().max()) < 1e-6
    rows = tiny_baseline().decoder
    lucky = torch.randn(500, 32, generator=generator())
    best = ((lucky / lucky.norm(dim=1, keepdim=True)) @ rows.T).abs().amax(dim=1).median()
    assert float((rows @ uncarried_direction(rows, generator())).abs().max()) < float(best)


def test_disturbances_have_the_stated_norms_and_differ() -> None:
    stream = tiny_stream()
    noise = disturbance(stream, generator(1), noise=1.0, benign=0.0)
    by_conversation = stream.conversation_means(noise)
    assert torch.allclose(by_conversation[stream.conversation], noise, atol=1e-4)
    assert float(by_conversation.square().sum(dim=1).mean().sqrt()) == pytest.approx(stream.sd, rel=0.15)
    benign = disturbance(stream, generator(1), noise=0.0, benign=0.25)
    assert float(benign.square().sum(dim=1).mean().sqrt()) == pytest.approx(0.25 * stream.sd, rel=1e-4)
    assert torch.linalg.matrix_rank(benign) == 1
    assert not torch.equal(noise, disturbance(stream, generator(2), 1.0, 0.0))


def test_frequent_and_rare_latents_come_from_their_pools() -> None:
    stream = tiny_stream()
    drawn = {
        kind: {plants(kind, stream, seed=s)[0].latents[0] for s in range(12)} for kind in ("latent", "rare latent")
    }
    assert drawn["rare latent"] == {40, 41, 42} and len(drawn["latent"]) > 6 and max(drawn["latent"]) < 40
    with pytest.raises(InputError, match="leave 'rare latent' out of kinds"):
        make_plants("rare latent", [0.5], stream, tiny_baseline().decoder, {"frequent": [1], "rare": []}, generator())


def test_pools_split_the_live_latents() -> None:
    rates = torch.tensor([0.0, 0.5, 0.005, 0.01, 0.2, 0.3, 0.4, 0.0])
    assert pools(rates) == {"frequent": [1, 3, 4, 5, 6], "rare": [2]}
    with pytest.raises(InputError, match="only 2 latents fire on 1%"):
        pools(torch.tensor([0.0, 0.5, 0.5]))


def test_bad_input_says_what_to_change() -> None:
    with pytest.raises(InputError, match="plant in a Llama or Qwen model"):
        tiny_stream(make_model("gemma2"))
    with pytest.raises(InputError, match="plant in a Llama or Qwen model"):
        tiny_stream(make_model("gpt2"))
    with pytest.raises(InputError, match="selection is empty"):
        read_stream(make_model(), make_tokenizer(), [], LAYER)


def test_a_latent_more_in_the_pool_changes_no_draw_but_its_own() -> None:
    """Rates differ in their last digits between machines and numbers of threads: draws must not hang on all of them."""

    def draws(pool: list[int]) -> list[tuple[int, ...]]:
        return [draw_latents(pool, 3, 500, torch.Generator().manual_seed(seed)) for seed in range(1000)]

    pool = list(range(0, 500, 2))
    before, after = draws(pool), draws([*pool, 77])
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert 0 < len(changed) < 50 and all(77 in new for new in changed)
    assert all(len(set(drawn)) == 3 and set(drawn) <= set(pool) for drawn in before)
