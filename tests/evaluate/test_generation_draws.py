"""Draws come from the right distribution, and hardly notice the last bits of the logits."""

import numpy as np
import pytest
import torch
from transformers import TopPLogitsWarper

from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.decoding import choose, gumbel, keep_top_p, row_key
from persona_probe.evaluate.sampling.requests import Prompt, Request, SamplingConfig, request_seed

PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05])
ROWS = 4000


def shares(config: SamplingConfig) -> torch.Tensor:
    """How often each of four tokens comes in 4,000 rows at one step."""
    keys = [row_key(0, "q", n) for n in range(ROWS)]
    tokens = choose(PROBABILITIES.log().repeat(ROWS, 1), keys, [3] * ROWS, config)
    return torch.bincount(tokens, minlength=4) / ROWS


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    wanted = (PROBABILITIES ** (1 / temperature)) / (PROBABILITIES ** (1 / temperature)).sum()
    errors = (wanted * (1 - wanted) / ROWS).sqrt()
    assert bool(((shares(SamplingConfig(temperature=temperature)) - wanted).abs() < 3.5 * errors).all())


def test_top_p_keeps_the_nucleus_and_its_proportions() -> None:
    found = shares(SamplingConfig(top_p=0.75))
    assert found[2:].tolist() == [0, 0]
    assert found[0].item() == pytest.approx(0.5 / 0.8, abs=0.03)
    assert shares(SamplingConfig(top_p=1e-6)).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(("spread", "top_p"), [(0.1, 0.9), (3.0, 0.9), (3.0, 0.2)])
def test_the_nucleus_is_transformers_own(spread: float, top_p: float) -> None:
    logits = spread * torch.randn(3, 3000, generator=torch.Generator().manual_seed(0))
    wanted = TopPLogitsWarper(top_p)(torch.LongTensor([[0]] * 3), logits.clone())
    assert torch.equal(keep_top_p(logits, top_p).isinf(), wanted.isinf())
    assert 0 < wanted.isinf().sum() < wanted.numel()


def test_noise_belongs_to_row_and_step() -> None:
    keys = [row_key(0, "q", 0), row_key(0, "q", 1), row_key(1, "q", 0), row_key(0, "p", 0)]
    noise = gumbel(keys, [0, 0, 0, 0], 50)
    assert torch.equal(gumbel([keys[2], keys[0]], [0, 0], 50), noise[[2, 0]])
    assert torch.equal(gumbel(keys[:1], [0], 20)[0], noise[0, :20])
    both = torch.cat([noise, gumbel(keys, [1, 1, 1, 1], 50)])
    assert len(torch.unique(both)) == both.numel()
    assert float(gumbel(keys, [9] * 4, 50_000).mean()) == pytest.approx(np.euler_gamma, abs=0.02)


def test_last_bits_of_the_logits_hardly_ever_change_a_token() -> None:
    rows, noise = 300, torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(rows, 2000, generator=torch.Generator().manual_seed(0))
    keys = [row_key(0, "q", n) for n in range(rows)]
    steps, config = [0] * rows, SamplingConfig()
    drawn = choose(logits, keys, steps, config)
    changed = [
        int((choose(logits + size * torch.randn(logits.shape, generator=noise), keys, steps, config) != drawn).sum())
        for size in (1e-5, 1e-1)
    ]
    assert changed[0] <= 1
    assert 3 <= changed[1] <= 0.2 * rows


def test_greedy_takes_the_likeliest() -> None:
    assert shares(SamplingConfig(temperature=0)).tolist() == [1, 0, 0, 0]


def test_request_seeds_are_31_bits_and_differ() -> None:
    prompts = [Prompt("a", []), Prompt("b", [])]
    seeds = [request_seed(SamplingConfig(seed=s), Request(p, n)) for s in (0, 1) for p in prompts for n in range(5)]
    assert len(set(seeds)) == 20 and all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": 0.0, "n": 3}, "3 equal answers: set n to 1"),
    ],
)
def test_bad_values_say_what_to_change(values: dict[str, float], match: str) -> None:
    with pytest.raises(InputError, match=match):
        SamplingConfig(**values)  # pyright: ignore
