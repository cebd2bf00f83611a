"""Sampling: seeded, ordered, and without a trace in the caller's random state."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.evaluate.sampling import sample_answers

PROMPTS = ["a?", "bb?", "a much longer one?"]


def test_same_seed_same_answers_and_random_state(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    state = torch.get_rng_state()
    first = sample_answers(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=12, seed=4)
    assert sample_answers(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=12, seed=4) == first
    assert sample_answers(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=12, seed=5) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_answers_do_not_depend_on_the_batch(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    together = sample_answers(tiny_model, tiny_tokenizer, PROMPTS, max_new_tokens=6, temperature=0)
    alone = [sample_answers(tiny_model, tiny_tokenizer, [p], max_new_tokens=6, temperature=0)[0] for p in PROMPTS]
    assert together == alone
