"""Sampling from every family: greedy answers are transformers' own, drawn ones are those of each row alone."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from persona_probe.data.chat import conversation
from persona_probe.evaluate.sampling import decoding
from persona_probe.evaluate.sampling.decoding import AnswerRequest, choose, decode, row_key, rows_can_join
from persona_probe.evaluate.sampling.engines import TransformersEngine
from persona_probe.evaluate.sampling.requests import Prompt, SamplingConfig, prompt_ids, stop_tokens
from persona_probe.evaluate.sampling.samples import sample
from persona_probe.models.taps import SteerTap
from tests.families import AVAILABLE, D_MODEL, FAMILIES, make_family, plain

LAYER, NEW = 1, 5
GREEDY = SamplingConfig(temperature=0, max_new_tokens=NEW)
DRAWN = SamplingConfig(n=2, max_new_tokens=NEW, seed=3, temperature=1.2, top_p=0.95)
# Longer and shorter than the sliding windows (16).
PROMPTS = [Prompt(f"q{n}", conversation("Why? " * n + "So.")) for n in (1, 5)]


def answers(
    model: nn.Module, prompts: list[tuple[int, ...]], config: SamplingConfig, stop: frozenset[int]
) -> list[list[int]]:
    requests = [AnswerRequest(ids, row_key(config.seed, f"q{n}", 0)) for n, ids in enumerate(prompts)]
    out: list[list[int]] = [[] for _ in requests]
    decode(model, requests, config, stop, 2, lambda number, made, _: out.__setitem__(number, made))
    return out


def alone(model: Any, ids: tuple[int, ...], number: int, config: SamplingConfig, stop: frozenset[int]) -> list[int]:
    """Every token from a forward pass over the whole row."""
    made: list[int] = []
    for step in range(config.max_new_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*ids, *made]]), use_cache=False).logits[:, -1]
        token = int(choose(logits, [row_key(config.seed, f"q{number}", 0)], [step], config))
        if token in stop:
            break
        made.append(token)
    return made


@pytest.mark.parametrize("name", AVAILABLE)
def test_greedy_answers_are_transformers_own(name: str) -> None:
    model, tokenizer = make_family(name)
    prompts = [prompt_ids(plain(name, tokenizer), p) for p in PROMPTS]
    stop = stop_tokens(model, tokenizer) | set(range(40, 60))  # so that some answers end early
    settings = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=sorted(stop), pad_token_id=min(stop))
    for made, ids in zip(answers(model, prompts, GREEDY, stop), prompts, strict=True):
        row = torch.tensor([ids])
        own: Any = model.generate(input_ids=row, attention_mask=torch.ones_like(row), generation_config=settings)  # pyright: ignore
        own = own[0, len(ids) :].tolist()
        assert made == own[: next((n for n, token in enumerate(own) if token in stop), NEW)]


@pytest.mark.parametrize("name", AVAILABLE)
def test_drawn_answers_are_those_of_each_row_alone(name: str) -> None:
    model, tokenizer = make_family(name)
    prompts = [prompt_ids(plain(name, tokenizer), p) for p in PROMPTS]
    stop = stop_tokens(model, tokenizer) | set(range(60, 70))
    made = answers(model, prompts, DRAWN, stop)
    assert made == [alone(model, ids, number, DRAWN, stop) for number, ids in enumerate(prompts)]
    direction = 99 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    with SteerTap(model, LAYER, direction):
        steered = answers(model, prompts[:1], DRAWN, stop)
        assert steered == [alone(model, prompts[0], 0, DRAWN, stop)]
    assert steered != made[:1]
    assert rows_can_join(model, prompts[0]) != FAMILIES[name].recurrent


@pytest.mark.parametrize("positions", ["prompt", "response"])
def test_by_generate_prompts_and_answers_are_told_apart(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_family("llama3")
    engine = TransformersEngine(model, tokenizer, batch_size=2)
    direction = 9 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 1, dtype=torch.bool)
    with SteerTap(model, LAYER, direction, positions, mask) as tap:
        joined = sample(engine, PROMPTS, DRAWN)
        monkeypatch.setattr(decoding, "rows_can_join", lambda *_: False)
        assert sample(engine, PROMPTS, DRAWN) == joined
        assert tap.prompt_mask is mask
    assert sample(engine, PROMPTS, DRAWN) != joined


def test_generate_leaves_the_model_s_settings_alone_and_does_not_obey_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_family("lfm2")
    prompts = [prompt_ids(tokenizer, p) for p in PROMPTS]
    stop = stop_tokens(model, tokenizer)
    before = answers(model, prompts, GREEDY, stop)
    model.generation_config.repetition_penalty, model.generation_config.min_new_tokens = 9.0, 7  # pyright: ignore
    settings = model.generation_config
    assert answers(model, prompts, GREEDY, stop) == before
    assert model.generation_config is settings and not model._forward_pre_hooks


def test_a_model_whose_cache_is_of_another_kind_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_family("llama3")
    prompts = [prompt_ids(tokenizer, p) for p in PROMPTS]
    forward = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        """Logits depend on how many tokens a call got: one more state than keys and values."""
        out = forward(*args, **kwargs)
        out.logits = out.logits * (1 if kwargs["input_ids"].shape[1] > 1 or kwargs.get("cache_position") else -1)
        return out

    monkeypatch.setattr(model, "forward", counting)
    assert not rows_can_join(model, prompts[0])
