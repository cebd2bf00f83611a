"""The causal sweep: zero stays zero, damage cancels in the odd part, and the perplexity bound is kept."""

import numpy as np
import torch

from persona_probe.evaluate.contrast import contrast_index
from persona_probe.latents.causal import latent_direction
from persona_probe.models.taps import steer
from tests.factories import LAYER, make_model, make_sae
from tests.latents.sweeps import DIRECTION, ITEMS, make_sweep


def test_pushes_equal_steering_the_whole_model() -> None:
    model = make_model()
    sweep = make_sweep(model=model)
    plain = contrast_index(model, ITEMS, bf16=False)["value"].to_numpy()
    assert np.allclose(sweep.unsteered, plain, atol=1e-5)
    with steer(model, LAYER, DIRECTION.vector, -1.5, "x_delta", reference_norm=2.0):
        wanted = contrast_index(model, ITEMS, bf16=False)["value"].to_numpy()
    assert np.allclose(sweep.push(DIRECTION, -1.5).values, wanted, atol=1e-4)
    assert not np.allclose(wanted, plain, atol=0.05)


def test_the_table_holds_every_push_once() -> None:
    sweep = make_sweep()
    for strength in (1.0, -1.0, 1.0):
        sweep.push(DIRECTION, strength)
    frame = sweep.table("base")
    assert frame["strength"].tolist() == [1.0, -1.0]
    assert np.allclose(frame["delta"], frame["estimate"] - sweep.unsteered.mean())
    assert set(frame["unit"]) == {"x_delta"} and set(frame["latent"]) == {4}
    assert (frame["within_bound"] == (frame["perplexity_ratio"] <= sweep.bound)).all()


def test_a_latents_direction_is_its_decoder_row() -> None:
    decoder = make_sae("topk").W_dec
    found = latent_direction(decoder, 12, "candidate")
    assert torch.equal(found.vector, decoder[12]) and not found.vector.requires_grad
    assert (found.name, found.latent, found.kind) == ("latent 12", 12, "candidate")
