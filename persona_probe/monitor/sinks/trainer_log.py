"""Readings in a trainer's own log, so that whatever `report_to` names shows them next to the loss."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persona_probe.monitor.events import Event
from persona_probe.monitor.sinks.curves import CurveSink, active_trackio, log_beside, write_scalars

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

log = logging.getLogger(__name__)

SECTIONS = ("TensorBoardCallback", "WandbCallback", "TrackioCallback")
"""Callbacks of transformers that show our values in a section of their own."""
Step = Callable[[], None]


@dataclass(frozen=True)
class Row:
    """What is to be logged at a step."""

    values: dict[str, float]
    """For every tracker, and for the trainer's history."""
    bounds: dict[str, float]
    """Intervals and bands: for the trackers that have a section of ours, not for the console."""
    step: int

    @property
    def all(self) -> dict[str, float]:
        """Everything."""
        return {**self.values, **self.bounds}


class TrainerLogSink(CurveSink):
    """Logs through a `transformers.Trainer` (TRL's are such), in the trainer's own log call where it makes one.

    A trainer does not pass itself to its callbacks, and what they add in `on_log` comes after the loggers have run. So
    the sink needs the trainer itself, as TRL's `LogCompletionsCallback` does: pass it here, or to `attach` later.

    Where the trainer logs at a reading's step, the values are added to that call; elsewhere they are a row of their
    own. They go into `state.log_history` at their step. TensorBoard, W&B and trackio get them with intervals and bands
    as `persona/<feature>`; other trackers get means and shifts, under the prefix that transformers puts before
    everything (`train/persona/<feature>`).

    Args:
        trainer: the trainer that trains.
    """

    def __init__(self, trainer: "Trainer | None" = None) -> None:
        super().__init__()
        self.trainer: Trainer | None = None
        self._waiting: Row | None = None
        self._logging: Row | None = None
        self._held: list[dict[str, float]] = []
        self._error: Exception | None = None
        self._warned = self._busy = False
        self._sections: list[Any] = []
        """Callbacks that write our section."""
        if trainer is not None:
            self.attach(trainer)

    def attach(self, trainer: "Trainer") -> None:
        """Log to this trainer from now on."""
        if self.trainer is not trainer:
            self.trainer = trainer
            setattr(trainer, "log", self._with_ours(trainer, trainer.log))  # noqa: B010 (as in monitor/trainers.py)
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__name__ in SECTIONS and not any(callback is known for known in self._sections):
                self._sections.append(callback)
                setattr(callback, "on_log", self._in_section(callback, callback.on_log))  # noqa: B010

    def emit(self, event: Event) -> None:
        """Collect the numbers of an event.

        Raises:
            Exception: what a tracker raised when it was given values in the trainer's log call.
        """
        if (error := self._error) is not None:
            self._error = None
            raise error
        if not self._busy:  # a callback may react to a log of ours with another event
            super().emit(event)

    def close(self) -> None:
        """Write what is left; the loggers belong to the trainer."""
        super().close()
        self._write_waiting()

    # How a row reaches the trainer

    def _write(self, values: dict[str, float], bounds: dict[str, float], step: int) -> None:
        if self.trainer is None:
            self._warn()
            return
        self._write_waiting()
        self._waiting = Row(values, bounds, step)
        if not _will_log(self.trainer, step):
            self._write_waiting()

    def _write_waiting(self) -> None:
        """Log what waits as a row of its own, and leave the trainer's own row of this step to come.

        TRL's `log` averages and empties its metrics, so the base class's is called. Every `on_log` resets `should_log`,
        so the step's loss would be lost when a reading comes at a logging step.
        """
        from transformers import Trainer

        row, self._waiting = self._waiting, None
        if row is None or self.trainer is None:
            return
        trainer, control = self.trainer, self.trainer.control
        should_log, self._busy, self._logging = control.should_log, True, row
        try:
            Trainer.log(trainer, dict(row.values))
            trainer.state.log_history[-1]["step"] = row.step
        finally:
            trainer.control.should_log, self._busy, self._logging = should_log, False, None

    def _with_ours(self, trainer: "Trainer", own: Callable[..., None]) -> Callable[..., None]:
        """The trainer's `log`, which takes along what waits for it."""

        @functools.wraps(own)
        def logged(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            row = self._waiting
            if row is None or trainer.state.global_step != row.step:
                own(logs, *args, **kwargs)
                return
            self._waiting, self._logging, self._busy = None, row, True
            logs.update(row.values)
            try:
                own(logs, *args, **kwargs)
            finally:
                self._logging, self._busy = None, False

        return logged

    def _in_section(self, callback: "TrainerCallback", own: Callable[..., Any]) -> Callable[..., Any]:
        """A tracker's `on_log`, which gets our values under their own names. What fails there is our fault, not its."""

        @functools.wraps(own)
        def on_log(args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
            row = self._logging
            if row is None or self._error is not None or not state.is_world_process_zero:
                result = own(args, state, control, logs=logs, **kwargs)
                if self._held and type(callback).__name__ == "TrackioCallback":
                    self._attempt(self._to_trackio)
                return result
            rest = {name: value for name, value in (logs or {}).items() if name not in row.values}
            alone = not rest.keys() - {"epoch", "num_input_tokens_seen"}
            before, after = self._around(callback, args, row, alone)
            self._attempt(before)
            result = None if alone else own(args, state, control, logs=rest, **kwargs)
            self._attempt(after)
            return result

        return on_log

    def _around(self, callback: Any, args: Any, row: Row, alone: bool) -> tuple[Step, Step]:
        """What to do before and after the trainer's own row is logged to a tracker; `alone` where there is none."""
        kind = type(callback).__name__
        if kind == "TensorBoardCallback":
            return _nothing, lambda: _to_tensorboard(callback, args, row)
        if kind == "WandbCallback":
            return lambda: _to_wandb(callback, row, alone), _nothing
        return _nothing, lambda: self._to_trackio(row)

    def _to_trackio(self, row: Row | None = None) -> None:
        """Log a row, and those that wait for the trainer's first step."""
        self._held += [] if row is None else [{**row.all, "train/global_step": row.step}]
        run = active_trackio()
        if run is not None:
            self._held = log_beside(run, self._held)

    def _attempt(self, call: Callable[[], None]) -> None:
        """Call what writes to a tracker inside the trainer's log: it must not end training. The next event raises."""
        try:
            call()
        except Exception as error:
            self._error = error

    def _warn(self) -> None:
        if not self._warned:
            log.warning("readings are not logged by a trainer: call attach(trainer) on the TrainerLogSink")
            self._warned = True


def _will_log(trainer: "Trainer", step: int) -> bool:
    """Whether the trainer is at this step and logs at it, after its callbacks."""
    logged = getattr(trainer, "_globalstep_last_logged", -1)
    return bool(trainer.control.should_log) and trainer.state.global_step == step > logged


def _nothing() -> None:
    pass


def _to_tensorboard(callback: Any, args: Any, row: Row) -> None:
    if callback.tb_writer is None:  # closed by the end of training
        callback._init_summary_writer(args)
    write_scalars(callback.tb_writer, row.all, row.step)


def _to_wandb(callback: Any, row: Row, alone: bool) -> None:
    run = callback._wandb.run
    if alone:
        run.log({**row.all, "train/global_step": row.step})
    else:  # the trainer's own call, which follows, commits it
        run.log(row.all, commit=False)
