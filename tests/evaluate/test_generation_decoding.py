"""Decoding side by side gives what each answer alone gives, recomputed without any cache, whatever steers the model."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from persona_probe.config import Training
from persona_probe.data.chat import conversation
from persona_probe.data.template import end_of_turn
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.decoding import choose, row_key
from persona_probe.evaluate.sampling.engines import TransformersEngine
from persona_probe.evaluate.sampling.requests import (
    Prompt,
    Request,
    Sample,
    SamplingConfig,
    prompt_ids,
    stop_tokens,
)
from persona_probe.evaluate.sampling.samples import sample
from persona_probe.finetune.sft import with_adapter
from persona_probe.models.layers import autocast, base_transformer
from persona_probe.models.taps import ablate, steer
from tests.factories import (
    ARCHITECTURES,
    D_MODEL,
    LAYER,
    copied_state,
    hook_count,
    make_model,
    make_tokenizer,
    same_state,
)

TOKENIZER = make_tokenizer()
PROMPTS = [Prompt(f"q{n}", conversation("why? " * n + "a", system="Be brief.")) for n in (1, 4, 2)]
PROMPTS.append(Prompt("other", conversation("no system here")))
CONFIG = SamplingConfig(n=3, max_new_tokens=9, seed=5)
DIRECTION = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
ANY_MASK = torch.ones(1, 1, dtype=torch.bool)


def stopping(model: Any) -> Any:
    """A random model that ends about every fifth turn within nine tokens."""
    model.generation_config.eos_token_id = list(range(1, 9))
    return model


def alone(model: Any, prompt: Prompt, number: int, config: SamplingConfig, push: Callable[[int], Any]) -> Sample:
    """One answer, every token from a forward pass over the whole row; `push(n_prompt)` makes the tap of a pass."""
    ids, made = prompt_ids(TOKENIZER, prompt), []
    key, stop, finish = row_key(config.seed, prompt.id, number), stop_tokens(model, TOKENIZER), "length"
    for step in range(config.max_new_tokens):
        row = torch.tensor([[*ids, *made]])
        with torch.no_grad(), push(row.shape[1]):
            token = int(choose(model(row, use_cache=False).logits[:, -1], [key], [step], config))
        if token in stop:
            finish = "stop"
            break
        made.append(token)
    text = str(TOKENIZER.decode(made, skip_special_tokens=True)).strip()
    return Sample(prompt.id, number, text, len(made), finish)


def each_alone(model: Any, config: SamplingConfig, push: Callable[[Prompt], Callable[[int], Any]]) -> list[Sample]:
    return [alone(model, p, n, config, push(p)) for p in PROMPTS for n in range(config.n)]


def no_push(_: Prompt) -> Callable[[int], Any]:
    return lambda _: torch.no_grad()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_are_those_of_each_row_alone_without_cache(architecture: str) -> None:
    model = stopping(make_model(architecture))
    found = sample(TransformersEngine(model, TOKENIZER, batch_size=5), PROMPTS, CONFIG)
    assert found == each_alone(model, CONFIG, no_push)
    assert len({s.answer for s in found}) > 6


def test_the_same_answers_come_for_any_batch_size_order_and_company() -> None:
    model = stopping(make_model())
    wanted = {(s.question_id, s.sample): s for s in sample(TransformersEngine(model, TOKENIZER), PROMPTS, CONFIG)}
    assert {s.finish for s in wanted.values()} == {"stop", "length"}
    requests = [Request(p, n) for p in PROMPTS for n in range(CONFIG.n)]
    for batch_size, count in itertools.product((1, 3, 8), (5, len(requests))):
        some, found = random.Random(batch_size).sample(requests, count), []
        TransformersEngine(model, TOKENIZER, batch_size).generate(some, CONFIG, found.append)
        assert len(found) == count
        assert all(s == wanted[s.question_id, s.sample] for s in found)


def test_seeds_samples_and_questions_draw_apart() -> None:
    model, prompt = make_model(), PROMPTS[0]
    twin = Prompt("twin", prompt.messages)
    engine = TransformersEngine(model, TOKENIZER)
    draws = [sample(engine, [prompt, twin], SamplingConfig(n=4, max_new_tokens=9, seed=seed)) for seed in (0, 1)]
    assert len({s.answer for found in draws for s in found}) == 16


@pytest.mark.parametrize("positions", ["all", "prompt", "response"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steering_while_sampling_is_steering_every_whole_row(positions: str, temperature: float) -> None:
    model = stopping(make_model())
    config = SamplingConfig(n=1, max_new_tokens=9, temperature=temperature)

    def push(prompt: Prompt) -> Callable[[int], Any]:
        n_prompt = len(prompt_ids(TOKENIZER, prompt))

        def tap(width: int) -> Any:
            mask = torch.arange(width)[None] < n_prompt
            return steer(model, LAYER, DIRECTION, 4.0, positions=positions, prompt_mask=mask)

        return tap

    engine = TransformersEngine(model, TOKENIZER, batch_size=3)
    plain = sample(engine, PROMPTS, config)
    with steer(model, LAYER, DIRECTION, 4.0, positions=positions, prompt_mask=ANY_MASK) as tap:
        found = sample(engine, PROMPTS, config)
        assert tap.prompt_mask is ANY_MASK
    assert found == each_alone(model, config, push)
    assert found != plain


def test_ablating_while_sampling_is_ablating_every_whole_row() -> None:
    model = stopping(make_model())
    plain = sample(TransformersEngine(model, TOKENIZER), PROMPTS, CONFIG)
    with ablate(model, LAYER, DIRECTION):
        found = sample(TransformersEngine(model, TOKENIZER), PROMPTS, CONFIG)
    assert found == each_alone(model, CONFIG, lambda _: lambda _: ablate(model, LAYER, DIRECTION))
    assert found != plain


def test_a_push_for_each_row_is_refused() -> None:
    model = make_model()
    pushes = DIRECTION.repeat(2, 1)
    with (
        pytest.raises(InputError, match="steer with one vector"),
        steer(model, LAYER, pushes, strength=1.0),
    ):
        sample(TransformersEngine(model, TOKENIZER), PROMPTS, CONFIG)


def test_under_autocast_greedy_answers_are_transformers_own() -> None:
    model = make_model()
    ids = torch.tensor([prompt_ids(TOKENIZER, PROMPTS[0])])
    with torch.no_grad(), autocast(model):
        wanted = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)  # pyright: ignore
        found = sample(
            TransformersEngine(model, TOKENIZER), PROMPTS[:1], SamplingConfig(temperature=0, max_new_tokens=12)
        )
    assert found[0].answer == str(TOKENIZER.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def tokens_run(model: nn.Module, work: Callable[[], object]) -> int:
    """Tokens that go through the transformer, padding included."""
    counts: list[int] = []

    def count(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        counts.append(kwargs["input_ids"].numel())

    handle = base_transformer(model).register_forward_pre_hook(count, with_kwargs=True)
    work()
    handle.remove()
    return sum(counts)


def test_a_prompt_is_run_once_for_all_its_samples() -> None:
    model, prompt = make_model(), PROMPTS[1]
    model.generation_config.eos_token_id = None  # pyright: ignore
    config = SamplingConfig(n=8, max_new_tokens=5, temperature=0.01)
    found: list[Sample] = []
    count = tokens_run(model, lambda: found.extend(sample(TransformersEngine(model, TOKENIZER), [prompt], config)))
    assert [s.n_tokens for s in found] == [5] * 8
    assert count == len(prompt_ids(TOKENIZER, prompt)) - 1 + 8 * 5


def test_a_shared_system_prompt_is_run_once() -> None:
    model = make_model()
    prompts = [Prompt(letter, conversation(letter, system="word " * 20)) for letter in "abcd"]
    length = len(prompt_ids(TOKENIZER, prompts[0]))
    after = 1 + len(["<|im_end|>", *"\n", "<|im_start|>", *"assistant\n"]) - 1  # the letter, to the last but one token
    config = SamplingConfig(temperature=0, max_new_tokens=1)
    count = tokens_run(model, lambda: sample(TransformersEngine(model, TOKENIZER), prompts, config))
    assert count == (length - 1 - after) + 4 * after + 4


def test_rows_that_end_make_room_for_others() -> None:
    model = make_model()
    model.generation_config.eos_token_id = list(range(1, 130))  # pyright: ignore
    config, found = SamplingConfig(n=40, max_new_tokens=30), []
    prompt = PROMPTS[0]
    engine = TransformersEngine(model, TOKENIZER, batch_size=8)
    count = tokens_run(model, lambda: found.extend(sample(engine, [prompt], config)))
    steps = sum(int(s.n_tokens) + (s.finish == "stop") for s in found)
    assert max(s.n_tokens for s in found) > 2 * steps / 40
    assert steps <= count - len(prompt_ids(TOKENIZER, prompt)) + 1 <= 1.5 * steps


def test_an_adapter_is_sampled_from_and_told_apart() -> None:
    base = make_model()
    wanted = sample(TransformersEngine(base, TOKENIZER), PROMPTS, CONFIG)
    tuned: Any = with_adapter(make_model(), Training(rank=2), 0)
    engine = TransformersEngine(tuned, TOKENIZER)
    assert sample(engine, PROMPTS, CONFIG) == wanted  # a fresh adapter adds nothing
    on = engine.identity["weights"]
    with tuned.disable_adapter():
        assert engine.identity["weights"] != on
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert sample(engine, PROMPTS, CONFIG) != wanted
    assert engine.identity["weights"] != on
    with tuned.disable_adapter():
        assert sample(engine, PROMPTS, CONFIG) == wanted


def test_a_failure_on_the_way_leaves_the_model_as_it_was() -> None:
    model = make_model().train()
    before, state = copied_state(model), torch.get_rng_state()

    def fail(_: Sample) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        TransformersEngine(model, TOKENIZER).generate([Request(PROMPTS[0], 0)], CONFIG, fail)
    assert model.training and all(m.training for m in model.modules())
    assert hook_count(model) == 0 and same_state(copied_state(model), before)
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)


def test_all_ways_to_end_a_turn_stop_an_answer() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    model.generation_config.eos_token_id = [7, 9]  # pyright: ignore
    tokenizer.eos_token = "<|im_start|>"
    assert end_of_turn(tokenizer) == {1}
    assert stop_tokens(model, tokenizer) == {7, 9, 0, 1}
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(tokenizer) == set()
    tokenizer.chat_template = "{{ raise_exception('no assistant') }}"
    assert end_of_turn(tokenizer) == set()


def test_what_cannot_be_sampled_is_refused() -> None:
    model = make_model()
    engine = TransformersEngine(model, TOKENIZER)
    with pytest.raises(InputError, match="'x' must end with a user turn"):
        sample(engine, [Prompt("x", conversation("a", "b"))], CONFIG)
    with pytest.raises(InputError, match=r"'x' has 5\d\d tokens.* 512 positions"):
        sample(engine, [Prompt("x", conversation("a" * 500))], CONFIG)
