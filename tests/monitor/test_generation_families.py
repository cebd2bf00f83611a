"""A watched answer's readings are those of a forward pass over the finished text, and watching changes no token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from persona_probe.data.chat import conversation
from persona_probe.data.template import with_template
from persona_probe.data.tokens import answer_prompt
from persona_probe.evaluate.sampling import decoding
from persona_probe.evaluate.sampling.decoding import AnswerRequest, decode, row_key
from persona_probe.evaluate.sampling.requests import Prompt, SamplingConfig, prompt_ids, stop_tokens
from persona_probe.models.adapters import load_adapter, merged_copy
from persona_probe.models.layers import evaluating, forward_to_layer
from persona_probe.models.taps import ReadTap
from persona_probe.monitor.generation.monitor import GenerationMonitor
from persona_probe.monitor.generation.trace import Trace
from persona_probe.saes.read import encode
from tests.factories import AVAILABLE, D_MODEL, FAMILIES, LAYER, hook_count, make_family, make_sae, make_tokenizer
from tests.families import THINKING, family_tokenizer, plain
from tests.models.adapter_kinds import KINDS, base_model, write_adapter

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


# --- Thoughts: the templates of families that think


class Scripted(LogitsProcessor):
    """Leaves every row the next token of a script."""

    def __init__(self, script: list[int], prompt: int) -> None:
        self.script, self.prompt = script, prompt

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Logits that are -inf but for that token."""
        only = torch.full_like(scores, -torch.inf)
        only[:, self.script[input_ids.shape[1] - self.prompt]] = 0.0
        return only


@pytest.mark.parametrize("name", THINKING)
def test_a_thought_is_read_token_by_token_like_the_answer_after_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_family(name)[0], with_template(family_tokenizer(name), enable_thinking=True)
    script = tokenizer.encode(THINKING[name], add_special_tokens=False)
    question = conversation(QUESTIONS[1])
    prompt, sae = answer_prompt(tokenizer, question), make_sae("jumprelu")
    monitor = GenerationMonitor(model, sae, features(), tokenizer=tokenizer)
    monkeypatch.setattr(decoding, "choose_each", lambda _, rows: torch.tensor([script[step] for _, step, _ in rows]))
    (ours,) = monitor.generate([question], max_new_tokens=len(script))
    ids = torch.tensor([prompt])
    with monitor.watching() as watch:
        theirs = model.generate(  # pyright: ignore
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(script),
            logits_processor=[watch, Scripted(script, len(prompt))],
        )
    for answer in (ours, *watch.answers(theirs)):
        assert list(answer.trace.ids) == script[:-1] and answer.finish == "stop"
        assert (answer.thought, answer.text) == ("Hm, aeiou.", "Try.")
        check(answer.trace, model, sae, prompt)
    if name == "r1-distill":
        return  # its template drops the thought of a conversation
    key = "thinking" if name == "gpt-oss" else "reasoning_content"
    (read,) = monitor.read([[*question, {"role": "assistant", "content": "Try.", key: "Hm, aeiou."}]])
    assert read.trace.ids == ours.trace.ids and (read.thought, read.text) == (ours.thought, ours.text)
    np.testing.assert_allclose(read.trace.values, ours.trace.values, atol=2e-3 * np.abs(read.trace.values).max())


# --- Adapters that replace whole modules

SAVED = [kind for kind in KINDS if kind.startswith("saved")]
TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is so."}]


def own_pass(model: Any, ids: list[int]) -> np.ndarray:
    """The direction's projection at every token, from the hidden states of the model's own forward."""
    with torch.no_grad():
        x: Tensor = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER + 1][0]
    unit = features()["direction"] / features()["direction"].norm()
    return (x @ unit).numpy()


def forms(kind: str, folder: Path) -> Iterator[tuple[str, Any]]:
    """An adapted model in each of its forms: on its base, merged in place, and as plain weights."""
    base = base_model(kind)
    write_adapter(folder, kind)
    yield "base", base
    yield "plain weights", merged_copy(base, folder)
    tuned: Any = load_adapter(base, folder)
    yield "on its base", tuned
    tuned.merge_adapter()
    yield "merged in place", tuned
    tuned.unmerge_adapter()
    yield "taken apart again", tuned


@pytest.mark.parametrize("kind", SAVED)
def test_an_adapter_that_replaces_modules_is_read_on_its_base_and_merged(kind: str, tmp_path: Path) -> None:
    tokenizer, sae, values = make_tokenizer(), make_sae("jumprelu"), dict[str, np.ndarray]()
    prompts = [answer_prompt(tokenizer, conversation(question)) for question in QUESTIONS]
    for form, model in forms(kind, tmp_path / "adapter"):
        own_sampling(model, tokenizer, prompts)
        transformers_generate(model, tokenizer, prompts, one_by_one=False)
        monitor = GenerationMonitor(model, sae, features(), tokenizer=tokenizer)
        (ours,), (given,) = monitor.generate(QUESTIONS[:1], max_new_tokens=NEW), monitor.read([TALK])
        for trace in (ours.trace, given.trace):
            prompt = answer_prompt(tokenizer, TALK[:1])
            own = own_pass(model, [*prompt, *trace.ids])[len(prompt) :]
            read = np.isfinite(trace.of("direction"))
            np.testing.assert_allclose(trace.of("direction")[read], own[read], atol=2e-3 * np.abs(own).max())
        values[form] = given.trace.values
    size = 2e-3 * np.abs(values["on its base"]).max()
    for form in ("merged in place", "taken apart again", "plain weights"):
        np.testing.assert_allclose(values[form], values["on its base"], atol=size)
    assert np.abs(values["base"] - values["on its base"]).max() > 10 * size
