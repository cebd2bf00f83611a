"""Driving a monitor: by a trainer's events, by a plain loop, or by another framework's adapter."""

import functools
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, Self

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from persona_probe.errors import InputError
from persona_probe.monitor.outlets import Outlets
from persona_probe.monitor.run import Run
from persona_probe.monitor.setup import Setup, Training

if TYPE_CHECKING:
    from persona_probe.monitor.sinks.sink import Sink


class TrainerHooks(TrainerCallback):
    """Translates a trainer's events for a monitor."""

    training: Training | None = None

    @abstractmethod
    def attach(self, trainer: Trainer) -> Any:
        """Take the trainer."""

    @abstractmethod
    def begin(
        self, training: Training, tokenizer: PreTrainedTokenizerBase | None, step: int = 0, scoped: bool = False
    ) -> None:
        """Training begins after `step` steps."""

    @abstractmethod
    def step_done(self, step: int) -> None:
        """Optimizer step `step` is done."""

    @abstractmethod
    def finish(self, step: int) -> None:
        """Training is over."""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Find the trainer that is being made."""
        self._find_trainer()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Anchor, and read before the first step."""
        self._find_trainer()
        training = Training(kwargs["model"], control, state, args, kwargs.get("optimizer"), kwargs.get("lr_scheduler"))
        training.checkpoint_folder = Path(args.output_dir) if args.output_dir else None
        self.begin(training, _tokenizer(kwargs.get("processing_class")), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read when due."""
        if self.training is not None:
            self.training.control, self.training.state = control, state
            self.step_done(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take note of loss and learning rate."""
        if self.training is not None:
            self.training.note(logs or {})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read at the end, unless just done."""
        if self.training is not None:
            self.finish(state.global_step)

    def _find_trainer(self) -> None:
        trainer = calling_trainer(self)
        if trainer is not None:
            self.attach(trainer)


def _tokenizer(processing: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer, also of a multimodal processor."""
    inner = processing if isinstance(processing, PreTrainedTokenizerBase) else getattr(processing, "tokenizer", None)
    return inner if isinstance(inner, PreTrainedTokenizerBase) else None


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The trainer that is calling this callback: the nearest `self` up the stack that is a trainer and holds it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and callback in owner.callback_handler.callbacks:
            return owner
        frame = frame.f_back
    return None


# --- Connects a monitor with its file, with a trainer's loggers, and with the end of `train`


class Closing(Protocol):
    """What is closed."""

    def close(self) -> None:
        """Take all hooks off."""
        ...


def close_after_training(trainer: Trainer, monitor: Closing) -> None:
    """A trainer tells its callbacks nothing when training raises."""
    train = trainer.train

    @functools.wraps(train)
    def closing(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            monitor.close()

    setattr(trainer, "train", closing)  # noqa: B010 (a method that type checkers guard)


def log_through(outlets: Outlets, trainer: Trainer) -> None:
    from persona_probe.monitor.sinks.trainer_log import TrainerLogSink

    sinks = [sink for sink in outlets.sinks if isinstance(sink, TrainerLogSink)]
    if not sinks:
        sinks = [TrainerLogSink()]
        outlets.sinks += sinks
    for sink in sinks:
        sink.attach(trainer)


def with_file(sinks: "Sequence[Sink]", path: str | Path | None) -> "list[Sink]":
    if not path:
        return list(sinks)
    from persona_probe.monitor.sinks.files import JsonlSink

    return [JsonlSink(path), *sinks]


class Driven(TrainerHooks):
    """What follows a training run from its beginning to its end, however it is told of its steps."""

    def __init__(self, setup: Setup, outlets: Outlets, tokenizer: PreTrainedTokenizerBase | None, log: bool) -> None:
        self.setup, self.outlets, self.tokenizer, self.log = setup, outlets, tokenizer, log
        self.should_stop = False
        self.trainer: Trainer | None = None
        self._run: Run | None = None
        self._step = 0

    @contextmanager
    def watch(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        optimizer: Optimizer | None = None,
        scheduler: Any = None,
        checkpoint_folder: str | Path | None = None,
    ) -> Iterator[Self]:
        """For a plain loop: reads at once, then at each due `step(n)`, and at the end.

        Args:
            optimizer: for the learning rate in readings, and for actions that change it.
            scheduler: likewise.
            checkpoint_folder: where actions save.
        """
        folder = Path(checkpoint_folder) if checkpoint_folder else None
        training = Training(model, optimizer=optimizer, scheduler=scheduler, checkpoint_folder=folder)
        try:
            self.begin(training, tokenizer, scoped=True)
            yield self
            self.finish(self._step)
        finally:
            self.close()

    def step(self, step: int, loss: float | Tensor | None = None, lr: float | None = None) -> None:
        """Tell the monitor that optimizer step `step` of a plain loop is done.

        Args:
            loss: training loss (nats per token), for the record; a tensor is fetched at readings only.
            lr: learning rate, where `watch` was given no optimizer.
        """
        if self.training is None:
            raise InputError("step() belongs inside `with monitor.watch(model):`")
        logs = {"loss": loss.detach() if isinstance(loss, Tensor) else loss, "learning_rate": lr}
        self.training.note({name: value for name, value in logs.items() if value is not None})
        self.step_done(step)

    def begin(
        self, training: Training, tokenizer: PreTrainedTokenizerBase | None, step: int = 0, scoped: bool = False
    ) -> None:
        """Training begins after `step` steps: anchor, and read where the schedule asks for it."""
        run = self.open(training, tokenizer, step, scoped)
        if self.setup.schedule.at_start(step) and self.setup.probing:
            run.take(step)
        run.arm(step + 1)

    def open(self, training: Training, tokenizer: PreTrainedTokenizerBase | None, step: int, scoped: bool) -> Run:
        """Anchor to the base model and get ready; nothing is read yet."""
        self.close()
        self.should_stop = False
        if self.log and self.trainer is not None:
            log_through(self.outlets, self.trainer)
        self._run = Run(self, self.setup, self.outlets, training, tokenizer or self.tokenizer, step, scoped)
        self.training, self._step = training, step
        return self._run

    def step_done(self, step: int) -> None:
        """Optimizer step `step` is done: read if due."""
        run = self._run
        assert run is not None
        stride, self._step = max(1, step - self._step), step
        if (run.wanted or self.setup.schedule.due(step)) and step != run.last_step:
            run.take(step)
        run.arm(step + stride)

    def finish(self, step: int) -> None:
        """Training is over: read once more, say so, close."""
        if self._run is not None:
            self._run.finish(step)
        self.training = None

    def request_stop(self) -> None:
        """Ask training to stop: a trainer does, a plain loop looks at `should_stop`."""
        self.should_stop = True

    def close(self) -> None:
        """Take all hooks off and close the sinks; safe to call twice."""
        if self._run is not None:
            self._run.close()
        self.training = None

    def attach(self, trainer: Trainer) -> Self:
        """Watch this trainer: the monitor becomes one of its callbacks and is closed however `train` ends.

        Passing the monitor in `callbacks=` does the same.
        """
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        if self.trainer is not trainer:
            self.trainer = trainer
            close_after_training(trainer, self)
        return self
