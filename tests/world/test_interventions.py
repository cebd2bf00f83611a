"""Pushes and removals at chosen tokens: they act there and nowhere else, in sampling as in a whole forward pass."""

import pytest
import torch
from torch import Tensor

from persona_probe.data.chat import conversation
from persona_probe.data.tokens import answer_prompt
from persona_probe.errors import InputError
from persona_probe.evaluate.sampling.samples import sample_answers
from persona_probe.models.taps import EditTap, read
from persona_probe.world.folder import World
from persona_probe.world.interventions import TOKENS, PlaceTap, pushed, removed

LAYER = 1
QUESTIONS = ["how do i cook soup ?", "any advice on clutch today ?", "please tell me about rent ."]


def by_hand(model, tokenizer, question: str, change, where: str, length: int) -> str:
    """Greedy words of whole forward passes, in which the layer's output is changed at the right places by number."""
    ids = answer_prompt(tokenizer, conversation(question))
    start = len(ids)
    places = {"all": slice(None), "last_prompt": slice(start - 1, start), "response": slice(start, None)}

    def edit(resid: Tensor) -> Tensor:
        resid = resid.clone()
        resid[:, places[where]] = change(resid[:, places[where]])
        return resid

    for _ in range(length):
        with EditTap(model, LAYER, edit), torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("where", TOKENS)
def test_sampled_answers_are_those_of_whole_passes_changed_by_position(world: World, where: str) -> None:
    model, tokenizer = world.load()
    vector = 8 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    basis = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
    span = torch.linalg.qr(basis.T)[0]
    cases = {
        "push": (pushed(model, tokenizer, LAYER, where, vector), lambda x: x + vector),
        "removal": (removed(model, tokenizer, LAYER, where, basis), lambda x: x - x @ span @ span.T),
    }
    plain = sample_answers(model, tokenizer, QUESTIONS, max_new_tokens=6, temperature=0)
    changed = []
    for name, (intervention, change) in cases.items():
        with intervention:
            sampled = sample_answers(model, tokenizer, QUESTIONS, max_new_tokens=6, temperature=0)
        wanted = [by_hand(model, tokenizer, question, change, where, 6) for question in QUESTIONS]
        assert [text.split() for text in sampled] == [text.split() for text in wanted], name
        changed.append(sampled != plain)
    assert any(changed)
    assert sample_answers(model, tokenizer, QUESTIONS, max_new_tokens=6, temperature=0) == plain


def test_nothing_is_left_on_the_model_after_an_error(world: World) -> None:
    model, tokenizer = world.load()
    with pytest.raises(ZeroDivisionError), pushed(model, tokenizer, LAYER, "all", torch.ones(32)):
        raise ZeroDivisionError
    assert not model.get_input_embeddings()._forward_pre_hooks
    with read(model, LAYER) as tap, torch.no_grad():
        model(input_ids=torch.tensor([[6, 7, 8]]))
    assert tap.value.shape == (1, 3, 32)
    with pytest.raises(InputError, match="unknown tokens"):
        PlaceTap(model, 4, LAYER, "answer")
    with pytest.raises(InputError, match="width"):
        PlaceTap(model, 4, LAYER, "all", push=torch.ones(31))
