"""What an action is, what it sees of the training run, and the shortest actions."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments

from persona_probe.errors import InputError, unknown
from persona_probe.monitor.events import NOT_FINITE, Alarm
from persona_probe.monitor.rules.rule import Rule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActionContext:
    """The training run as an action sees it. A plain loop has no control, state or args."""

    step: int
    model: nn.Module
    monitor: Any = None
    """Its `request_stop()` ends a plain loop."""
    control: TrainerControl | None = None
    state: TrainerState | None = None
    args: TrainingArguments | None = None
    optimizer: Optimizer | None = None
    """The optimizer, or accelerate's wrapper of it."""
    scheduler: Any = None
    """A learning rate scheduler of torch or transformers, or accelerate's wrapper of one."""
    checkpoint_folder: Path | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Action(ABC):
    """Something to do at an alarm."""

    only_for: Collection[str] | None = None
    """Names of the rules whose alarms it acts on; None acts on all."""

    @property
    def every_rank(self) -> bool:
        """Whether it changes training, so that every process of a distributed run must call it at the same reading."""
        return True

    def act(self, alarm: Alarm, context: ActionContext) -> None:
        """Act on the alarm, if its rule is among `only_for`.

        Raises:
            InputError: the run lacks what the action needs (an optimizer, a folder).
        """
        if self.only_for is None or alarm.rule in self.only_for:
            self._do(alarm, context)

    @abstractmethod
    def _do(self, alarm: Alarm, context: ActionContext) -> None: ...

    def clean(self, context: ActionContext) -> None:  # noqa: B027 (most actions need not know)
        """Called after a reading at which every rule was inside (`all_inside`): the model is in a clean state."""


def check_actions(rules: Iterable[Rule], actions: Iterable[Action]) -> None:
    """Refuse an action for a rule that the monitor does not have.

    Raises:
        InputError: `only_for` names no rule; near matches are listed.
    """
    known = [*(rule.title for rule in rules), NOT_FINITE]
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
        InputError: none of these is known.
    """
    if folder is not None:
        return Path(folder)
    if context.checkpoint_folder is not None:
        return context.checkpoint_folder
    if context.args is not None and context.args.output_dir is not None:
        return Path(context.args.output_dir)
    name = type(action).__name__
    raise InputError(f"{name} has no folder to write to: pass {name}(folder=...)")


# --- The shortest actions: log, call a function, stop


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
    """Call a function with the alarm and the context."""

    function: Callable[[Alarm, ActionContext], object]
    ranks: bool = False
    """Call it in every process of a distributed run; needed if it changes training."""

    @property
    def every_rank(self) -> bool:
        """The value of `ranks`."""
        return self.ranks

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        self.function(alarm, context)


@dataclass(frozen=True, eq=False)
class StopTraining(Action):
    """Stop after this step. An alarm before the first step lets a trainer take that step."""

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        request_stop(context)
