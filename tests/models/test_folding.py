"""Folded adapters and bf16 copies of frozen weights: the same numbers, and nothing left behind."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from persona_probe.models.adapters import bf16_weight, foldable, folded, frozen_in_bf16
from tests.factories import copied_state, make_model, same_state

IDS = torch.arange(2, 14).reshape(2, 6)


def tuned(**options: object) -> PeftModel:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **options)  # pyright: ignore
    return get_peft_model(make_model(), config).eval()  # pyright: ignore


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


def test_folding_gives_the_adapters_output_and_leaves_no_trace() -> None:
    model = tuned()
    before, state = logits(model), copied_state(model)
    with model.disable_adapter():
        base = logits(model)
    with folded(model, bf16=False):
        inside = logits(model)
        assert any("forward" in m.__dict__ for m in model.modules() if foldable(m))
    assert torch.allclose(inside, before, atol=1e-4)
    assert not torch.allclose(inside, base, atol=0.1)
    assert torch.equal(logits(model), before) and same_state(copied_state(model), state)


def test_an_error_inside_takes_the_folding_off() -> None:
    model = tuned()
    with pytest.raises(KeyError), folded(model):
        raise KeyError
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_what_is_not_plain_lora_is_left_alone() -> None:
    model = tuned(use_dora=True)
    before = logits(model)
    with folded(model, bf16=False):
        assert torch.equal(logits(model), before)
    assert not any(foldable(m) for m in model.modules())
    plain = tuned()
    with plain.disable_adapter():
        assert not any(foldable(m) for m in plain.modules())


def test_bf16_copies_give_what_autocast_gives() -> None:
    model = tuned()
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = logits(twin)
        with frozen_in_bf16(model):
            assert torch.allclose(logits(model), wanted, atol=0.1 * float(wanted.std()))
            with model.disable_adapter():
                base = logits(model)
        with twin.disable_adapter():
            assert torch.equal(logits(twin), base)
    plain = logits(twin)
    with frozen_in_bf16(model):
        assert torch.equal(logits(model), plain)  # outside autocast nothing is cast
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_the_kept_bf16_weight_is_the_cast_one() -> None:
    head = tuned().get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    with frozen_in_bf16(head):
        assert bf16_weight(head) is bf16_weight(head)
        assert torch.equal(bf16_weight(head), head.weight.to(torch.bfloat16))
    assert bf16_weight(head) is not bf16_weight(head)


def test_gradients_under_bf16_copies_are_autocasts() -> None:
    grads = []
    for enabled in (False, True):
        model = tuned().train()
        with frozen_in_bf16(model, enabled), torch.autocast("cpu", torch.bfloat16):
            model(IDS).logits.float().square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert grads[0]
    for a, b in zip(*grads, strict=True):
        assert a is not None and b is not None
        assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98
