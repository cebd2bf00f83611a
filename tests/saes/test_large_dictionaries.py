"""No path holds all tokens at all latents: the largest tensor is bounded, and the numbers are the dense way's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from persona_probe.data.chat import conversation
from persona_probe.data.tokens import batches
from persona_probe.evaluate.answers import answer_logprobs
from persona_probe.latents import attribution
from persona_probe.latents.attribution import gradient_scores
from persona_probe.latents.cards import survey_model
from persona_probe.latents.passages import gather
from persona_probe.latents.planted import plant
from persona_probe.latents.planted.plant import Baseline, Stream
from persona_probe.mitigate.losses import latent_excess
from persona_probe.saes import read
from persona_probe.saes.patching import patch
from persona_probe.saes.quality import SpliceTap, check_quality
from persona_probe.saes.read import encode, encode_latents, read_latents
from tests.factories import D_MODEL, D_SAE, LAYER, make_model, make_sae, make_tokenizer, talks

TALKS = [conversation(f"Why {n}?", "because it is so " * 3) for n in range(6)]
AT_ONCE = 4
"""Tokens that are encoded together in these tests."""
X = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(5))
CONVERSATION = torch.arange(50) // 5


class LargestOfLatents(TorchDispatchMode):
    """The most tokens that any tensor holds at all latents."""

    tokens = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.ndim > 1 and made.shape[-1] == D_SAE:
                self.tokens = max(self.tokens, made.numel() // D_SAE)
        return out


def latents(sae: Any) -> Any:
    found = read_latents(make_model(), sae, list(batches(make_tokenizer(), TALKS, 6)), LAYER, "response", bf16=False)
    return found.mean, found.firing, found.maximum, found.square


def chosen(sae: Any) -> Any:
    return encode_latents(sae, X, [3, 1])


def gradients(sae: Any) -> Any:
    groups, flags = list(batches(make_tokenizer(), talks(), 6)), np.array([True, False] * 3)
    return gradient_scores(make_model(), sae, groups, flags, LAYER, bf16=False).attribution


def spliced(sae: Any) -> Any:
    model = make_model()
    with SpliceTap(model, LAYER, sae):
        return answer_logprobs(model, list(batches(make_tokenizer(), talks(), 6)), bf16=False)


def patched(sae: Any) -> Any:
    model = make_model()
    with patch(model, make_model(seed=3), sae=sae, latents=[1, 2]):
        return answer_logprobs(model, list(batches(make_tokenizer(), talks(), 6)), bf16=False)


def quality(sae: Any) -> Any:
    return list(check_quality(sae, make_model(), make_tokenizer(), TALKS, LAYER).values())


def cards(sae: Any) -> Any:
    text = gather(make_tokenizer(), conversations=TALKS)
    survey = survey_model(make_model(), sae, LAYER, [3, 1], text)
    return survey.histograms["model"].counts, [passage.values for passage in survey.passages.best(0)]


def planted(sae: Any) -> Any:
    stream = Stream(X, X, CONVERSATION, tuple(str(n) for n in range(10)), np.arange(10) % 2 == 0)
    baseline = Baseline(stream, sae, ("rise",), 0)
    return baseline.base.mean, baseline.base.firing, baseline.base.maximum, baseline.rates


READERS = (latents, chosen, gradients, spliced, patched, quality, cards, planted)


def numbers(value: Any) -> list[np.ndarray]:
    if isinstance(value, (list, tuple)):
        return [array for part in value for array in numbers(part)]
    return [np.asarray(value, dtype=float)]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_few_tokens_at_a_time_give_the_numbers_of_all_at_once(
    reader: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LargestOfLatents() as dense:
        expected = numbers(reader(make_sae("topk")))
    for module, name in (
        *((read, name) for name in ("CHUNK_VALUES", "ENCODED_AT_ONCE")),
        *((attribution, "ENCODED_AT_ONCE"), (plant, "CHUNK_VALUES")),
    ):
        monkeypatch.setattr(module, name, AT_ONCE * D_SAE)
    with LargestOfLatents() as few:
        found = numbers(reader(make_sae("topk")))
    # Sums by conversation, and the decoder's width, are no activations of tokens.
    assert few.tokens <= max(AT_ONCE, 12, D_MODEL) < dense.tokens
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_a_penalty_on_latents_that_do_not_compete_encodes_these_alone(architecture: str) -> None:
    sae, chosen_latents = make_sae(architecture), [3, 1]
    x = X.clone().requires_grad_(True)
    with LargestOfLatents() as largest:
        excess = latent_excess(sae, x, X * 0.5, chosen_latents)
    assert largest.tokens == 0
    rise = encode(sae, X)[:, chosen_latents] - encode(sae, X * 0.5)[:, chosen_latents]
    assert excess.item() == pytest.approx(rise.clamp(min=0).square().sum(dim=-1).mean().item(), rel=1e-4)
    (gradient,) = torch.autograd.grad(excess, x)
    assert gradient.abs().max() > 0 and all(p.grad is None for p in sae.parameters())
