"""Readings reach TensorBoard and the trainer's history, and the trainer's own log stays as it was."""

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from persona_probe.monitor.events import End
from persona_probe.monitor.sinks.curves import reading_values
from persona_probe.monitor.sinks.trainer_log import TrainerLogSink
from tests.factories import make_model, make_tokenizer
from tests.monitor.events import DIRECTION, TOXIC, alarm, behaviour, reading

STEPS = 4


class Emits(TrainerCallback):
    """Emits where a monitor does: before the first step, after every step, and at the end."""

    def __init__(self, sink: TrainerLogSink) -> None:
        self.sink = sink

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.sink.emit(reading(0, 1.0))
        self.sink.flush()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.sink.emit(reading(state.global_step, 1.0 + state.global_step))
        self.sink.emit(reading(state.global_step, 9.0, "passive", fit=math.nan))
        self.sink.flush()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.sink.emit(behaviour(state.global_step, -0.25))
        self.sink.emit(alarm(state.global_step))
        self.sink.emit(End(state.global_step, 5, 0.1))
        self.sink.close()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if any(name.startswith("persona") for name in kwargs["logs"]):
            self.sink.emit(reading(state.global_step, 99.0))  # would log itself for ever


def train(folder: Path, sink: TrainerLogSink | None) -> list[dict[str, Any]]:
    """The trainer's history after a short SFT run that logs its loss every second step."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    settings: dict[str, Any] = {"save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True}
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        logging_steps=2,
        report_to=["tensorboard"] if sink else [],
        seed=0,
        **settings,
    )
    from datasets import Dataset

    data = Dataset.from_list([{"prompt": f"Ask {n}?", "completion": f" Say {n * n}."} for n in range(8)])
    trainer = SFTTrainer(
        model=make_model(),
        args=arguments,
        train_dataset=data,
        processing_class=make_tokenizer(),
        callbacks=[Emits(sink)] if sink else None,
    )
    if sink:
        sink.attach(trainer)
    trainer.train()
    return trainer.state.log_history


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Any]:
    """The history, and what TensorBoard reads back from its files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "board"))
        history = train(folder, TrainerLogSink())
    board = EventAccumulator(str(folder / "board"))
    board.Reload()
    return history, board


def curve(board: Any, tag: str) -> list[tuple[int, Any]]:
    return [(scalar.step, pytest.approx(scalar.value)) for scalar in board.Scalars(tag)]


def test_tensorboard_shows_the_readings(logged: tuple[list[dict[str, Any]], Any]) -> None:
    _, board = logged
    assert curve(board, f"persona/{TOXIC}") == [(n, 1.0 + n) for n in range(STEPS + 1)]
    assert curve(board, f"persona/{TOXIC}_shift") == [(n, 2.0 * n) for n in range(STEPS + 1)]
    assert curve(board, "persona/explained_variance") == [(n, 0.75) for n in range(STEPS + 1)]
    assert curve(board, f"persona_passive/{TOXIC}") == [(n, 9.0) for n in range(1, STEPS + 1)]
    assert curve(board, "behaviour/contrast index (nats/token)") == [(STEPS, -0.25)]
    assert curve(board, "persona/alarms") == [(n, 0.0) for n in range(STEPS + 1)] + [(STEPS, 1.0)]
    assert "persona_passive/explained_variance" not in board.Tags()["scalars"]  # NaN


def test_the_loss_is_still_logged_when_it_was_due(logged: tuple[list[dict[str, Any]], Any]) -> None:
    history, board = logged
    assert [step for step, _ in curve(board, "train/loss")] == [2, 4]
    assert [row["step"] for row in history if "loss" in row] == [2, 4]


def test_the_trainers_own_rows_are_those_of_a_run_without(
    logged: tuple[list[dict[str, Any]], Any], tmp_path: Path
) -> None:
    def own(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
        timed, ours = ("runtime", "per_second"), ("persona", "behaviour")
        rows = [{k: v for k, v in row.items() if not k.endswith(timed) and not k.startswith(ours)} for row in history]
        return [row for row in rows if row.keys() - {"epoch", "step"}]

    plain = own(train(tmp_path, None))
    assert own(logged[0]) == plain
    assert [row["step"] for row in plain] == [2, 4, 4]
    assert all("mean_token_accuracy" in row for row in plain[:2])


def test_values_have_the_names_that_are_logged() -> None:
    assert reading_values(reading(3, 2.0)) == {
        "persona/explained_variance": 0.75,
        "persona/l0": 32.0,
        f"persona/{TOXIC}": 2.0,
        f"persona/{TOXIC}_shift": 2.0,
        f"persona/{DIRECTION}": 1.0,
        f"persona/{DIRECTION}_shift": 0.0,
    }


def test_without_a_trainer_it_says_once_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    sink = TrainerLogSink()
    for step in range(3):
        sink.emit(reading(step))
        sink.flush()
    sink.close()
    assert caplog.text.count("call attach(trainer)") == 1
