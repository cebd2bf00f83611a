"""Reading several kinds of positions at once is reading them one by one, with one forward pass."""

from typing import Any

import numpy as np
import pytest
import torch

from persona_probe.data.tokens import Batch, conversation_batches
from persona_probe.errors import InputError
from persona_probe.models.layers import decoder_layer
from persona_probe.models.residuals import read_residuals
from persona_probe.models.taps import read
from persona_probe.saes import read as reading
from persona_probe.saes.read import LatentMeans, encode, read_latents, read_latents_at
from tests.factories import LAYER, make_model, make_sae, make_tokenizer, talks

POSITIONS = ("last_prompt", "prompt", "response")


def groups() -> list[Batch]:
    return conversation_batches(make_tokenizer(), talks(), 4)


def at_once(sae: Any, positions: tuple[str, ...] = POSITIONS) -> dict[str, LatentMeans]:
    return read_latents_at(make_model(), sae, groups(), LAYER, positions, bf16=False)


def same(left: LatentMeans, right: LatentMeans) -> bool:
    assert left.square is not None and right.square is not None
    pairs = [(getattr(left, f), getattr(right, f)) for f in ("mean", "firing", "maximum", "resid", "square")]
    pairs.append((np.array([left.fit.error, left.fit.active]), np.array([right.fit.error, right.fit.active])))
    return left.fit.n == right.fit.n and all(np.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)


def test_each_position_equals_its_own_reading(tiny_sae: Any) -> None:
    found = at_once(tiny_sae)
    assert list(found) == list(POSITIONS)
    for name, means in found.items():
        assert same(means, read_latents(make_model(), tiny_sae, groups(), LAYER, name, bf16=False))
    assert not same(found["prompt"], found["response"])


def test_one_forward_pass_per_batch_whatever_the_positions() -> None:
    model, calls = make_model(), []
    handle = decoder_layer(model, 0).register_forward_hook(lambda *_: calls.append(1))
    read_latents_at(model, make_sae("topk"), groups(), LAYER, (*POSITIONS, "all"), bf16=False)
    handle.remove()
    assert len(calls) == len(groups()) == 2


def test_every_token_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counting(sae: Any, x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return encode(sae, x)

    monkeypatch.setattr(reading, "encode", counting)
    at_once(make_sae("standard"), ("prompt", "all", "response", "last_prompt"))
    tokens = sum(int((b.select("all") | b.select("last_prompt")).sum()) for b in groups())
    assert sum(sizes) == tokens


def test_small_parts_give_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make_sae("jumprelu")
    whole = at_once(sae)
    monkeypatch.setattr(reading, "ENCODED_AT_ONCE", 7 * 64)
    parts = at_once(sae)
    assert all(same(parts[name], whole[name]) for name in POSITIONS)


def test_moments_are_those_of_the_tokens(tiny_sae: Any) -> None:
    found, parts = at_once(tiny_sae)["prompt"], []
    for batch in groups():
        model = make_model()
        with torch.no_grad(), read(model, LAYER) as tap:
            model(batch.ids, attention_mask=batch.attention)
        parts.append(encode(tiny_sae, tap.value[batch.select("prompt")]))
    acts = torch.cat(parts).numpy()
    assert found.fit.n == len(acts)
    assert found.square is not None and np.allclose(found.square, np.square(acts).mean(axis=0), rtol=1e-4, atol=1e-5)
    assert np.allclose(found.maximum, acts.max(axis=0), atol=1e-4)


def test_residuals_are_visited_with_their_rows() -> None:
    seen: dict[int, int] = {}

    def visit(index: list[int], row: torch.Tensor, x: torch.Tensor) -> None:
        assert len(row) == len(x)
        seen.update({number: int((row == r).sum()) for r, number in enumerate(index)})

    read_residuals(make_model(), groups(), LAYER, "response", visit, bf16=False)
    counts = {n: int(m.sum()) for b in groups() for n, m in zip(b.index, b.select("response"), strict=True)}
    assert seen == counts


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(InputError, match="no positions to read: name some of all, prompt"):
        at_once(make_sae("topk"), ())
    with pytest.raises(InputError, match="unknown positions 'promt': did you mean 'prompt'"):
        at_once(make_sae("topk"), ("response", "promt"))
    prompts = conversation_batches(make_tokenizer(), [c[:-1] for c in talks(2)])
    with pytest.raises(InputError, match="no token at positions 'response'"):
        read_latents_at(make_model(), make_sae("topk"), prompts, LAYER, ("prompt", "response"))
