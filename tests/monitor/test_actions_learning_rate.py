"""A lowered rate stays lowered: every later step of the schedule gives its old rate times the factor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as schedules
from transformers import get_scheduler

from persona_probe.errors import InputError
from persona_probe.monitor.actions.action import ActionContext
from persona_probe.monitor.actions.learning_rate import LowerLearningRate
from tests.factories import make_model
from tests.monitor.action_runs import ALARM, Driver, train

STEPS = 12
MAKERS: dict[str, Callable[[Optimizer], Any]] = {
    "none": lambda o: None,
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: schedules.StepLR(o, 3, 0.5),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.8),
    "polynomial": lambda o: schedules.PolynomialLR(o, STEPS, 2.0),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, STEPS, eta_min=1e-3),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4, eta_min=1e-3),
    "cyclic": lambda o: schedules.CyclicLR(o, 1e-2, 0.1, 3, cycle_momentum=False),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.2, STEPS + 1),
    "sequence": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, 1.0, 8), schedules.CosineAnnealingLR(o, 4)], [8]
    ),
    "chain": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o, 0.5, 9), schedules.ExponentialLR(o, 0.8)]),
}
for kind in ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup", "inverse_sqrt"):
    MAKERS[f"transformers {kind}"] = lambda o, kind=kind: get_scheduler(kind, o, 2, STEPS)
for kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
    MAKERS[f"transformers {kind}"] = lambda o, kind=kind: get_scheduler(
        kind, o, 2, STEPS, scheduler_specific_kwargs={"min_lr": 1e-3}
    )
MAKERS["transformers warmup_stable_decay"] = lambda o: get_scheduler(
    "warmup_stable_decay", o, 2, STEPS, scheduler_specific_kwargs={"num_decay_steps": 4}
)


def optimizer_of(rates: tuple[Any, ...] = (0.1, 0.02)) -> Optimizer:
    layers = [nn.Linear(2, 2) for _ in rates]
    return SGD([{"params": m.parameters(), "lr": r} for m, r in zip(layers, rates, strict=True)], lr=0.1)


def lower(optimizer: Optimizer, scheduler: Any, factor: float = 0.25, floor: float = 0.0) -> None:
    context = ActionContext(3, nn.Linear(1, 1), optimizer=optimizer, scheduler=scheduler)
    LowerLearningRate(factor, floor).act(ALARM, context)


def rates_of(make: Callable[[Optimizer], Any], alarms: tuple[int, ...] = ()) -> list[list[float]]:
    """The rates of both groups at every step; alarms come after the scheduler's step, as in a trainer."""
    optimizer = optimizer_of()
    scheduler, rates = make(optimizer), []
    for step in range(STEPS):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if step in alarms:
            lower(optimizer, scheduler)
    return rates


@pytest.mark.parametrize("name", MAKERS)
def test_the_schedule_does_not_undo_it(name: str) -> None:
    plain, lowered = rates_of(MAKERS[name]), rates_of(MAKERS[name], alarms=(3, 9))
    for step in range(STEPS):
        factor = 0.25 ** sum(step > alarm for alarm in (3, 9))
        assert lowered[step] == pytest.approx([factor * rate for rate in plain[step]], rel=1e-9, abs=1e-15)


def test_a_scheduler_that_reacts_goes_on_from_the_lowered_rate() -> None:
    optimizer = optimizer_of()
    scheduler = schedules.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    scheduler.step(1.0)
    lower(optimizer, scheduler)
    scheduler.step(2.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0125, 0.0025])


def test_the_base_rate_keeps_its_floor() -> None:
    optimizer = optimizer_of()
    scheduler = schedules.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    for _ in range(3):
        lower(optimizer, scheduler, factor=0.5, floor=0.015)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.015 / 4, 0.015 / 4])
    bare = optimizer_of((0.01,))
    lower(bare, None, factor=0.5, floor=0.02)
    assert bare.param_groups[0]["lr"] == 0.01


def test_a_rate_in_a_tensor_is_changed_in_place() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = AdamW([weight], lr=torch.tensor(0.1))
    held = optimizer.param_groups[0]["lr"]
    scheduler = schedules.LambdaLR(optimizer, lambda step: 1.0)
    lower(optimizer, scheduler)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is held and float(held) == pytest.approx(0.025)


def test_it_holds_in_a_trainer_and_its_checkpoint(tmp_path: Path) -> None:
    plain, lowered = Driver([]), Driver([LowerLearningRate(0.1)], alarms=[2])
    train(tmp_path / "a", make_model(), plain, lr_scheduler_type="cosine", warmup_steps=1)
    trainer = train(tmp_path / "b", make_model(), lowered, lr_scheduler_type="cosine", warmup_steps=1)
    wanted = [rate * (0.1 if step >= 2 else 1.0) for step, rate in enumerate(plain.rates)]
    assert lowered.rates == pytest.approx(wanted)
    scheduler: Any = trainer.lr_scheduler
    assert scheduler.state_dict()["base_lrs"] == pytest.approx([1e-3, 1e-3])


def test_bad_settings_say_what_to_change() -> None:
    for factor in (1.0, 0.0, float("nan")):
        with pytest.raises(InputError, match=f"factor must be between 0 and 1, not {factor}"):
            LowerLearningRate(factor)
    with pytest.raises(InputError, match="floor must be zero or more"):
        LowerLearningRate(0.5, -1)
    with pytest.raises(InputError, match="needs the optimizer"):
        LowerLearningRate().act(ALARM, ActionContext(3, nn.Linear(1, 1)))
