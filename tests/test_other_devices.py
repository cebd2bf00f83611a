"""Where model, SAE and rows differ in device or precision: what `test_devices` does not reach."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from persona_probe import context
from persona_probe.config import Loading, ReadSae
from persona_probe.context import ModelAndSae
from persona_probe.data.chat import conversation
from persona_probe.evaluate import answers
from persona_probe.evaluate.offline import offline_judge
from persona_probe.screening.reading import Reader
from tests.factories import D_MODEL, LAYER, make_model, make_sae, make_tokenizer

ANSWERED = [conversation(f"Why {n}?", f"because {n}") for n in range(4)]


def test_answers_are_read_right_where_a_model_does_not_run_from_a_shared_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, sae, tokenizer = make_model(), make_sae("topk"), make_tokenizer()
    reader = Reader(LAYER, sae, (1, 2), bf16=False)
    together = reader.read(model, tokenizer, ANSWERED)
    assert answers._agreeing[model]
    monkeypatch.setitem(answers._agreeing, model, False)  # pyright: ignore[reportArgumentType]
    # Whole rows, one at a time: the last forward pass has seen a single row.
    monkeypatch.setattr(answers, "_LOGITS_AT_ONCE", 1)
    apart = reader.read(model, tokenizer, ANSWERED)
    for name in ("resid", "latents", "nats"):
        np.testing.assert_allclose(getattr(apart, name), getattr(together, name), rtol=1e-4, atol=1e-5)


def test_a_judges_latents_are_those_of_an_sae_in_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(7, D_MODEL)).astype(np.float32)
    monkeypatch.setattr(offline_judge, "_read_one", lambda *_: (x, []))
    judge: Any = SimpleNamespace(weights=SimpleNamespace(recipe=SimpleNamespace(latent_layer=LAYER)))
    precise, rounded = (
        offline_judge._latents(judge, ("Why?", "So."), make_sae("standard").to(dtype))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.dtype == torch.float32 and float(precise.max()) > 0
    torch.testing.assert_close(rounded, precise, rtol=0.05, atol=0.05)


def test_further_saes_of_a_spread_model_go_to_their_layers_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "load_sae", lambda *_, **__: make_sae("topk"))
    monkeypatch.setattr(
        context, "layer_device", lambda _model, layer: torch.device("meta" if layer == LAYER else "cpu")
    )
    both: Any = ModelAndSae(SimpleNamespace(model="tiny", device="cpu"), "cpu")  # pyright: ignore[reportArgumentType]
    both.__dict__["_loaded"] = make_model(), make_tokenizer()
    (together,) = both.load_further([ReadSae("tiny")])
    both.loading = Loading(device_map="auto")
    (spread,) = both.load_further([ReadSae("tiny")])
    assert together.sae.W_dec.device.type == "cpu" and spread.sae.W_dec.device.type == "meta"
