"""Lower the learning rate in the middle of its schedule, in such a way that the schedule does not undo it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from persona_probe.errors import InputError
from persona_probe.monitor.actions.action import Action, ActionContext
from persona_probe.monitor.events import Alarm

IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")
"""Rates in an optimizer's parameter groups; all but the first are for a scheduler."""
IN_SCHEDULERS = ("base_lrs", "max_lrs", "_last_lr")
"""Lists of rates, one a parameter group, from which schedulers compute the next."""


@dataclass(frozen=True, eq=False)
class LowerLearningRate(Action):
    """Multiply the learning rate by `factor`, now and for the rest of its schedule; again at each alarm.

    Optimizer and scheduler are both changed, so that every later rate is `factor` times what the schedule would give.

    Raises:
        InputError: a factor outside (0, 1), or a negative floor.
    """

    factor: float = 0.5
    floor: float = 0.0
    """The schedule's base rate (without a scheduler: the rate) is not lowered below this."""

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1:
            raise InputError(f"factor must be between 0 and 1, not {self.factor}")
        if not self.floor >= 0:
            raise InputError(f"floor must be zero or more, not {self.floor}")

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        if context.optimizer is None:
            raise InputError("LowerLearningRate needs the optimizer: pass it to the monitor's watch(...)")
        scale_learning_rates(context.optimizer, context.scheduler, self.factor, self.floor)


def scale_learning_rates(optimizer: Optimizer, scheduler: Any, factor: float, floor: float = 0.0) -> list[float]:
    """Multiply every rate of every parameter group, and what the scheduler computes rates from.

    Afterwards each step of the schedule gives its old rate times the factor. This holds for the schedulers of torch
    and transformers, chains included. Those that react to a metric (`ReduceLROnPlateau`, `GreedyLR`) continue from the
    lowered rate, and keep their lower bounds.

    Args:
        scheduler: of torch or transformers, or accelerate's wrapper of one; None without a scheduler.
        factor: between 0 and 1.
        floor: a group's base rate is not lowered below this.

    Returns:
        The factor that was used for each parameter group.
    """
    factors = [_factor(group, factor, floor) for group in optimizer.param_groups]
    for group, by in zip(optimizer.param_groups, factors, strict=True):
        for name in IN_GROUPS:
            if name in group:
                group[name] = _scaled(group[name], by)
    for part in _parts(scheduler):
        _scale_schedule(vars(part), factors)
    return factors


def _factor(group: dict[str, Any], factor: float, floor: float) -> float:
    base = float(group.get("initial_lr", group["lr"]))
    return max(factor, min(1.0, floor / base)) if base > 0 else factor


def _parts(scheduler: Any) -> Iterator[Any]:
    """A scheduler, without wrappers, and all schedulers in it."""
    from accelerate.scheduler import AcceleratedScheduler

    if isinstance(scheduler, AcceleratedScheduler):
        scheduler = scheduler.scheduler
    if scheduler is None:
        return
    yield scheduler
    for part in vars(scheduler).get("_schedulers", ()):
        yield from _parts(part)


def _scale_schedule(schedule: dict[str, Any], factors: Sequence[float]) -> None:
    for name in IN_SCHEDULERS:
        if name in schedule:
            schedule[name] = [_scaled(rate, by) for rate, by in zip(schedule[name], factors, strict=True)]
    if "eta_min" in schedule:
        # The cosine's lower end moves too, or the rate would climb back to it. It is one number for all groups.
        schedule["eta_min"] *= max(factors)


def _scaled(rate: float | Tensor, by: float) -> float | Tensor:
    """A tensor is changed in place: compiled and capturable optimizers keep hold of it."""
    return rate.mul_(by) if isinstance(rate, Tensor) else rate * by
