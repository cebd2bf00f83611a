"""A watched answer's readings are those of a forward pass over the finished text, and watching changes no token."""

from typing import Any

import numpy as np
import pytest
import torch

from persona_probe.data.chat import conversation
from persona_probe.evaluate.sampling.decoding import AnswerRequest, decode, row_key
from persona_probe.evaluate.sampling.requests import Prompt, SamplingConfig, prompt_ids, stop_tokens
from persona_probe.models.layers import evaluating, forward_to_layer
from persona_probe.models.taps import ReadTap
from persona_probe.monitor.generation.monitor import GenerationMonitor
from persona_probe.monitor.generation.trace import Trace
from persona_probe.saes.read import encode
from tests.factories import AVAILABLE, D_MODEL, FAMILIES, LAYER, hook_count, make_family, make_sae
from tests.families import plain

LATENTS = {"a": 3, "b": 40, "c": 17}
QUESTIONS = ["Why?", "What should I cook for eleven guests today?", "Who are you?"]
NEW = 6


def features() -> dict[str, Any]:
    return {**LATENTS, "direction": torch.linspace(-1, 1, D_MODEL)}


def whole_pass(model: Any, sae: Any, ids: list[int]) -> np.ndarray:
    """The features at every token of a text, by one forward pass without a cache."""
    with evaluating(model), ReadTap(model, LAYER) as tap:
        batch = torch.tensor([ids])
        forward_to_layer(model, LAYER, input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
    x = tap.value[0].float()
    unit = features()["direction"] / features()["direction"].norm()
    return torch.cat([encode(sae, x)[:, list(LATENTS.values())], (x @ unit)[:, None]], dim=1).numpy()


def check(trace: Trace, model: Any, sae: Any, prompt: list[int], tolerance: float = 2e-3) -> None:
    wanted = whole_pass(model, sae, [*prompt, *trace.ids])
    read = int(np.isfinite(trace.values[:, 0]).sum())
    assert read >= len(trace.ids) - 1
    size = np.abs(wanted).max()
    np.testing.assert_allclose(trace.prompt, wanted[len(prompt) - 1], atol=tolerance * size)
    np.testing.assert_allclose(trace.values[:read], wanted[len(prompt) :][:read], atol=tolerance * size)


@pytest.mark.parametrize("name", AVAILABLE)
def test_readings_are_those_of_a_whole_pass_and_the_tokens_are_the_same_without_the_monitor(name: str) -> None:
    model, raw = make_family(name)
    tokenizer = plain(name, raw)
    prompts = [list(prompt_ids(tokenizer, Prompt(str(n), conversation(q)))) for n, q in enumerate(QUESTIONS)]
    hooks = hook_count(model)
    own_sampling(model, tokenizer, prompts)
    transformers_generate(model, tokenizer, prompts, one_by_one=FAMILIES[name].recurrent)
    assert hook_count(model) == hooks


def own_sampling(model: Any, tokenizer: Any, prompts: list[list[int]]) -> None:
    sae, plainly = make_sae("jumprelu"), dict[int, list[int]]()
    monitor = GenerationMonitor(model, sae, features(), tokenizer=tokenizer)
    config = SamplingConfig(max_new_tokens=NEW, seed=3)
    requests = [AnswerRequest(tuple(ids), row_key(3, str(n), 0)) for n, ids in enumerate(prompts)]
    decode(model, requests, config, stop_tokens(model, tokenizer), 2, lambda n, made, _: plainly.update({n: made}))
    answers = monitor.generate(QUESTIONS, max_new_tokens=NEW, seed=3, batch_size=2)
    assert [list(answer.trace.ids) for answer in answers] == [plainly[n] for n in range(len(QUESTIONS))]
    assert any(np.abs(answer.trace.values[:-1, :3]).sum() > 0 for answer in answers)
    for ids, answer in zip(prompts, answers, strict=True):
        check(answer.trace, model, sae, ids)


def transformers_generate(model: Any, tokenizer: Any, prompts: list[list[int]], one_by_one: bool) -> None:
    sae = make_sae("topk")
    monitor = GenerationMonitor(model, sae, features(), tokenizer=tokenizer)
    # padding on the left enters the state of a recurrent model
    for rows in [[ids] for ids in prompts] if one_by_one else [prompts]:
        width, pad = max(map(len, rows)), tokenizer.pad_token_id or tokenizer.eos_token_id or 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        settings = {"max_new_tokens": NEW, "do_sample": True, "pad_token_id": pad, "attention_mask": mask}
        torch.manual_seed(1)
        plainly = model.generate(input_ids=ids, **settings)
        torch.manual_seed(1)
        with monitor.watching() as watch:
            watched = model.generate(input_ids=ids, **settings, logits_processor=[watch])
        assert torch.equal(plainly, watched)
        for row, answer in zip(rows, watch.answers(watched), strict=True):
            check(answer.trace, model, sae, row)
