"""A reading leaves everything as it was: modes, flags, random states, autocast, adapters, hooks."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from persona_probe.monitor.reading import reading_autocast, undisturbed
from tests.factories import copied_state, hook_count, make_model, make_tokenizer, same_state
from tests.monitor.monitored_runs import adapted, directions, loop, loop_batch, monitor


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a reading might change."""
    return {
        "modes": [m.training for m in model.modules()],
        "asked": [p.requires_grad for p in model.parameters()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # pyright: ignore
        "python": random.getstate(),
        "gradients": torch.is_grad_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "hooks": hook_count(model),
        "adapters": [getattr(m, "disable_adapters", None) for m in model.modules()],
    }  # fmt: skip


def mixed_modes() -> nn.Module:
    """A LoRA model in which nothing is uniform: some modules in eval mode, a frozen adapter matrix."""
    model = adapted(dropout=0.3).train()
    for number, module in enumerate(model.modules()):
        module.training = number % 3 != 0
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
    return model


def disturb() -> None:
    for draw in (torch.rand, np.random.rand):
        draw(3)
    random.random()


@pytest.mark.parametrize("keep_casts", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_guard_restores_all(keep_casts: bool, fails: bool) -> None:
    model = mixed_modes()
    before = everything(model)
    try:
        with undisturbed(model, keep_casts=keep_casts):
            assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
            disturb()
            assert everything(model)["torch"] != before["torch"]
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert everything(model) == before


@pytest.mark.parametrize("bf16", [True, False])
def test_readings_and_behaviour_restore_all(bf16: bool) -> None:
    model, watching = mixed_modes(), monitor(bf16=bf16, every=1, behaviour=lambda model: float(torch.rand(1)))
    before = everything(model)
    with watching.watch(model, make_tokenizer()) as live:
        assert everything(model) == before
        live.step(1)
    assert everything(model) == before and watching.faults == []


def test_a_failing_reading_restores_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, watching = mixed_modes(), monitor(every=1)
    with watching.watch(model, make_tokenizer()) as live:
        before = everything(model)
        columns = watching._run.probe.features.columns  # pyright: ignore
        monkeypatch.setattr(watching._run.probe.features, "columns", lambda *a, **k: (disturb(), columns(*a), 1 / 0))  # pyright: ignore
        live.step(1)
        assert everything(model) == before
    assert [f.part for f in watching.faults] == ["probe reading"]


def test_a_failing_reading_does_not_change_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(watched: bool) -> dict[str, torch.Tensor]:
        model, watching = adapted(dropout=0.3), directions(every=1)
        if not watched:
            return loop(model, 3)
        with watching.watch(model, make_tokenizer()) as live:
            monkeypatch.setattr(watching._run.probe, "_residuals", lambda *a: (disturb(), 1 / 0))  # pyright: ignore
            return loop(model, 3, live)

    assert same_state(run(True), run(False))


def test_interrupts_pass_and_leave_nothing() -> None:
    model = mixed_modes()
    before = everything(model)

    def interrupt(model: nn.Module) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), directions(mode="both", behaviour=interrupt).watch(model, make_tokenizer()):
        pass
    assert everything(model) == before


def step_in_autocast(read: bool, cached: bool = False) -> dict[str, torch.Tensor]:
    """One training step inside the user's own autocast block, perhaps with a reading inside the same block."""
    model, (ids, labels) = make_model().train(), loop_batch(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = directions(bf16=True)
    watching.start(model, make_tokenizer())
    with torch.autocast("cpu", torch.bfloat16):
        if cached:
            model(input_ids=ids)
        if read:
            watching.read(model, 0)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        if read:
            # Not the casts of the weights before the step.
            inside = watching.read(model, 1).values
    if read:
        assert np.array_equal(inside, watching.read(model, 1).values)
    return copied_state(model)


@pytest.mark.parametrize("cached", [True, False])
def test_a_reading_inside_the_users_autocast_block_keeps_its_casts_apart(cached: bool) -> None:
    trained = step_in_autocast(True, cached)
    assert same_state(trained, step_in_autocast(False, cached))
    assert not same_state(trained, copied_state(make_model()))


def test_the_cast_cache_is_left_alone_only_inside_autocast() -> None:
    with reading_autocast(torch.device("cpu"), True):
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", torch.bfloat16), reading_autocast(torch.device("cpu"), True):
        assert not torch.is_autocast_cache_enabled()
