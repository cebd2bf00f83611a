"""On the embedded model: the same answers for any batch, and the template's end of turn ends them."""

import random

import pytest

from persona_probe.data.chat import conversation
from persona_probe.data.template import end_of_turn
from persona_probe.evaluate.sampling.engines import TransformersEngine
from persona_probe.evaluate.sampling.requests import Prompt, Request, Sample, SamplingConfig
from persona_probe.evaluate.sampling.samples import sample
from persona_probe.models.load import load_model

pytestmark = pytest.mark.real_model


@pytest.mark.long
def test_the_default_model_answers_alike_in_any_batch() -> None:
    model, tokenizer = load_model("smollm2-135m-instruct")
    assert end_of_turn(tokenizer) == {2}
    prompts = [Prompt("sky", conversation("Name one colour.")), Prompt("sum", conversation("What is two and two?"))]
    config = SamplingConfig(n=3, max_new_tokens=8, seed=1)
    wanted = {(s.question_id, s.sample): s for s in sample(TransformersEngine(model, tokenizer, 8), prompts, config)}
    requests = [Request(p, n) for p in prompts for n in range(3)]
    for batch_size in (1, 3):
        found: list[Sample] = []
        random.Random(batch_size).shuffle(requests)
        TransformersEngine(model, tokenizer, batch_size).generate(requests, config, found.append)
        assert {(s.question_id, s.sample): s for s in found} == wanted
    assert len({s.answer for s in wanted.values()}) > 3
