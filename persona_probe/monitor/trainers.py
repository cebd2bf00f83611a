"""A monitor inside a trainer: it finds the trainer that calls it, logs through it, and closes when `train` ends."""

import functools
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

if TYPE_CHECKING:
    from persona_probe.monitor.sinks.sink import Sink


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The trainer that is calling this callback.

    A trainer does not pass itself to its callbacks, so the call stack is searched upwards for a `self` that is a
    trainer and holds the callback.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        handler = getattr(owner, "callback_handler", None) if isinstance(owner, Trainer) else None
        if handler is not None and callback in handler.callbacks:
            return owner
        frame = frame.f_back
    return None


def close_after_training(trainer: Trainer, close: Callable[[], None]) -> None:
    """Call `close` however `trainer.train` ends: a trainer calls no callback when training raises."""
    train = trainer.train

    @functools.wraps(train)
    def closing(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            close()

    setattr(trainer, "train", closing)  # noqa: B010 (a method that type checkers guard)


def read_before_best(trainer: Trainer, read_last: Callable[[], None]) -> None:
    """Read the last step before `load_best_model_at_end` replaces its weights, which it does before `on_train_end`."""
    load = getattr(trainer, "_load_best_model", None)
    if load is None:  # a monitor notices at the end that the weights are others, and does not read them
        return

    @functools.wraps(load)
    def reading_first(*args: Any, **kwargs: Any) -> Any:
        read_last()
        return load(*args, **kwargs)

    setattr(trainer, "_load_best_model", reading_first)  # noqa: B010 (a method that type checkers guard)


def attach_log(sinks: "Sequence[Sink]", trainer: Trainer) -> "list[Sink]":
    """The sinks with one that logs through this trainer."""
    from persona_probe.monitor.sinks.trainer_log import TrainerLogSink

    logging_sinks = [sink for sink in sinks if isinstance(sink, TrainerLogSink)]
    added = [] if logging_sinks else [TrainerLogSink()]
    for sink in logging_sinks + added:
        sink.attach(trainer)
    return [*sinks, *added]


def tokenizer_of(processing: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a trainer's `processing_class`, which may be a multimodal processor."""
    inner = processing if isinstance(processing, PreTrainedTokenizerBase) else getattr(processing, "tokenizer", None)
    return inner if isinstance(inner, PreTrainedTokenizerBase) else None
