"""What an action is, and what it sees of the training run."""

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from persona_probe.errors import InputError, unknown
from persona_probe.monitor.alarms.rules import Rule
from persona_probe.monitor.events import Alarm
from persona_probe.monitor.ranks import Ranks, is_sharded, unwrap


@dataclass(frozen=True)
class ActionContext:
    """The training run, as an action sees it. In a plain loop there is no control, state or args."""

    step: int
    model: nn.Module
    monitor: Any = None
    """Its `request_stop()` ends a plain loop."""
    control: TrainerControl | None = None
    state: TrainerState | None = None
    args: TrainingArguments | None = None
    optimizer: Optimizer | None = None
    """Also accelerate's wrapper of one."""
    scheduler: Any = None
    """A learning rate scheduler of torch or transformers, also in accelerate's wrapper."""
    checkpoint_folder: Path | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Action(ABC):
    """Something to do at an alarm."""

    only_for: Collection[str] | None = None
    """Names of the rules whose alarms it acts on; None acts on all."""

    @property
    def every_rank(self) -> bool:
        """Whether it changes training: then every process of a distributed run must call it at the same reading."""
        return True

    def act(self, alarm: Alarm, context: ActionContext) -> None:
        """Do it, where the alarm's rule is among `only_for`.

        Raises:
            InputError: the run lacks what the action needs (an optimizer, a folder).
        """
        if self.only_for is None or alarm.rule in self.only_for:
            self._do(alarm, context)

    @abstractmethod
    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        """Do it."""

    def clean(self, context: ActionContext) -> None:  # noqa: B027 (most actions need not know)
        """Called after a reading at which every rule was inside (`all_inside`): the model is as it should be."""


def check_actions(rules: Iterable[Rule], actions: Iterable[Action]) -> None:
    """Refuse an action for a rule that is not there.

    Raises:
        InputError: `only_for` names no rule; near matches are listed.
    """
    known = [rule.title for rule in rules]
    for action in actions:
        for name in action.only_for or ():
            if name not in known:
                raise unknown(f"rule in only_for of {type(action).__name__}", name, known)


def request_stop(context: ActionContext) -> None:
    """Ask the trainer, or the plain loop's monitor, to stop after this step."""
    if context.control is not None:
        context.control.should_training_stop = True
    elif context.monitor is not None:
        context.monitor.request_stop()


def folder_for(action: Action, folder: Path | str | None, context: ActionContext) -> Path:
    """Where an action writes: its own folder, else the monitor's, else the trainer's.

    Raises:
        InputError: there is none of them.
    """
    if folder is not None:
        return Path(folder)
    if context.checkpoint_folder is not None:
        return context.checkpoint_folder
    if context.args is not None and context.args.output_dir is not None:
        return Path(context.args.output_dir)
    name = type(action).__name__
    raise InputError(f"{name} has no folder to write to: pass {name}(folder=...)")


# --- Actions of one line: log, call back, stop

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LogAlarm(Action):
    """Log the alarm as a warning."""

    @property
    def every_rank(self) -> bool:
        """One line is enough."""
        return False

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        log.warning("step %d, %s: %s", alarm.step, alarm.rule, alarm.message)


@dataclass(frozen=True, eq=False)
class CallBack(Action):
    """Call a function of yours with the alarm and the context."""

    function: Callable[[Alarm, ActionContext], object]
    ranks: bool = False
    """Call it in every process of a distributed run; needed where it changes training."""

    @property
    def every_rank(self) -> bool:
        """As `ranks` says."""
        return self.ranks

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        self.function(alarm, context)


@dataclass(frozen=True, eq=False)
class StopTraining(Action):
    """Stop after this step. An alarm before the first step lets a trainer take that step."""

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        request_stop(context)


# --- Save a checkpoint at an alarm


@dataclass(frozen=True, eq=False)
class SaveCheckpoint(Action):
    """Save a checkpoint at the alarm.

    In a trainer it is the trainer's own, with its optimizer; it is written after the step, so that it has what other
    actions did to the weights, and `save_total_limit` applies. With `folder`, in plain loops, and where the trainer
    may not save (before its first step, and once it stops) the weights are written at once, to
    `<folder>/alarm-step-<N>`: by `save_pretrained` where the model has it, else as `model.safetensors`.
    """

    folder: Path | str | None = None
    """Where the weights are written at once; None takes the monitor's folder, else the trainer's `output_dir`."""

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        if self.folder is None and context.control is not None and _trainer_will_save(context):
            context.control.should_save = True
            return
        save_weights(context.model, folder_for(self, self.folder, context) / f"alarm-step-{alarm.step}")


def _trainer_will_save(context: ActionContext) -> bool:
    """Whether the trainer is past its first step, which clears the wish to save, and not at its end, which ignores it.

    At its last step transformers' own flow callback has asked to stop before any other callback is called.
    """
    state, control = context.state, context.control
    stopped = control is not None and control.should_training_stop
    return state is None or (state.global_step > 0 and not stopped)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write `folder` whole or not at all; an adapter where the model is a PEFT model. The first process writes.

    Raises:
        InputError: the weights are sharded over processes, or the folder cannot be written.
    """
    if is_sharded(model):
        raise InputError("the weights are sharded over processes: save them in a CallBack, or use a trainer")
    if not Ranks().first:
        return
    scratch = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _write(unwrap(model), scratch)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.replace(folder)
    except (OSError, SafetensorError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"could not write {folder} ({first}): free space, or choose another folder") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(model: nn.Module, folder: Path) -> None:
    if isinstance(model, PreTrainedModel | PeftModel):
        model.save_pretrained(str(folder))
    else:
        save_model(model, str(folder / "model.safetensors"))


# --- Lower a learning rate in the middle of its schedule, so that the schedule does not undo it

IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")
"""Rates in an optimizer's parameter groups; all but the first are there for a scheduler."""
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
    and transformers, chains of them included; those that react to a metric (`ReduceLROnPlateau`, `GreedyLR`) go on from
    the lowered rate, and keep their own lower bounds.

    Args:
        scheduler: of torch or transformers, or accelerate's wrapper of one; None where there is none.
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
