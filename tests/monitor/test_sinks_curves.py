"""Curves where people look: each tracker's own files are read back, with the right names and steps."""

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_probe.monitor.actions.action import LogAlarm
from persona_probe.monitor.events import Event
from persona_probe.monitor.sinks.curves import AlertSink, CurveSink, TensorBoardSink, TrackioSink, WandbSink
from tests.factories import make_model, make_tokenizer
from tests.monitor.events import DIRECTION, TOXIC, alarm, behaviour, reading, start
from tests.monitor.monitored_runs import FireAt, directions, sft

STEPS, EVERY, FIRES = 6, 2, 4
NAME = "persona/mean difference"
WANTED = [0, 2, 4, 6]
"""Steps of the readings; the loss is logged at every third step."""


def alarming(**settings: Any) -> Any:
    return directions(every=EVERY, log=True, rules=[FireAt(FIRES)], behaviour=lambda model: 0.5, **settings)


# --- What a sink of curves writes


class Written(CurveSink):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def _write(self, values: dict[str, float], bounds: dict[str, float], step: int) -> None:
        self.rows.append((step, {**values, **bounds}))


def rows(*events: Event) -> list[tuple[int, dict[str, float]]]:
    sink = Written()
    for event in events:
        sink.emit(event)
    sink.close()
    return sink.rows


def test_a_step_is_one_row_with_interval_band_and_a_count_of_alarms() -> None:
    passive = reading(2, 1.5, "passive", names=(TOXIC,), fit=float("nan"))
    written = rows(start(), reading(0), reading(2, 2.0), passive, behaviour(2), alarm(2), reading(4))
    assert [(step, row["persona/alarms"]) for step, row in written] == [(0, 0), (2, 1), (4, 1)]
    row = written[1][1]
    wanted = {"": 2.0, "_shift": 2.0, "_ci_low": 1.75, "_ci_high": 2.25, "_band_low": 0.75, "_band_high": 1.25}
    assert {end: row[f"persona/{TOXIC}{end}"] for end in wanted} == wanted
    assert row[f"persona_passive/{TOXIC}"] == 1.5 and row[f"persona/{DIRECTION}"] == 1.0
    assert row["behaviour/contrast index (nats/token)"] == -0.5
    assert "persona_passive/explained_variance" not in row  # NaN


def test_a_new_start_counts_alarms_from_zero() -> None:
    assert [row["persona/alarms"] for _, row in rows(reading(0), alarm(0), start(), reading(0))] == [1, 0]


# --- A trainer: our section in its own log call, and no step of it used up


def fit(folder: Path, tracker: str, **settings: Any) -> Any:
    """A run that logs its loss at every third step, and is read at every second."""
    watching = alarming()
    trainer = sft(folder, watching, report_to=[tracker], max_steps=STEPS, logging_steps=3, run_name="mine", **settings)
    trainer.train()
    assert watching.faults == [] and [a.step for a in watching.alarms] == [FIRES]
    return trainer


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path_factory.mktemp("board")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "files"))
        trainer = fit(folder, "tensorboard")
    board = EventAccumulator(str(folder / "files"))
    board.Reload()
    return trainer, board


def steps(board: Any, tag: str) -> list[int]:
    return [scalar.step for scalar in board.Scalars(tag)]


def test_tensorboard_has_a_section_persona(board: tuple[Any, Any]) -> None:
    trainer, files = board
    tags = files.Tags()["scalars"]
    assert not [tag for tag in tags if tag.startswith(("train/persona", "train/behaviour"))]
    ends = ("", "_shift", "_ci_low", "_ci_high", "_band_low", "_band_high")
    assert all(steps(files, NAME + end) == WANTED for end in ends)
    assert steps(files, "behaviour/behaviour") == WANTED
    assert [(s.step, s.value) for s in files.Scalars("persona/alarms")] == [(0, 0), (2, 0), (4, 1), (6, 1)]
    assert steps(files, "train/loss") == [3, 6] == [r["step"] for r in trainer.state.log_history if "loss" in r]


def test_the_history_has_readings_at_their_steps_and_one_row_where_the_trainer_logs(board: tuple[Any, Any]) -> None:
    history = board[0].state.log_history
    assert [row["step"] for row in history if NAME in row] == WANTED
    assert [row["step"] for row in history] == [0, 2, 3, 4, 6, 6]
    assert "loss" in history[4] and NAME in history[4] and f"{NAME}_ci_low" not in history[4]


BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format, after seven bytes of its own."""
    data, place, parts = path.read_bytes(), HEADER, list[bytes]()
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # too little is left of a block for a header
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + HEADER : place + HEADER + length])
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def wandb_rows(folder: Path) -> tuple[list[dict[str, Any]], list[str], dict[str, str]]:
    """History rows, alerts and x-axes of an offline run, from its own file."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found, alerts, axes = list[dict[str, Any]](), list[str](), dict[str, str]()
    for data in records(path):
        record: Any = wandb_internal_pb2.Record()  # pyright: ignore
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            found.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        elif kind == "alert":
            alerts.append(record.alert.title)
        elif kind == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return found, alerts, axes


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    wandb = pytest.importorskip("wandb", reason="W&B is not installed")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # else W&B keeps the folder of an earlier run
    yield tmp_path
    wandb.teardown()


def test_wandb_offline_has_a_section_persona_and_an_alert(offline: Path) -> None:
    import wandb

    fit(offline, "wandb")
    wandb.teardown()  # waits for the service, which writes the file
    found, alerts, axes = wandb_rows(offline)
    read = [row for row in found if NAME in row]
    assert [row["train/global_step"] for row in read] == WANTED
    assert [row["persona/alarms"] for row in read] == [0, 0, 1, 1]
    assert [row["train/global_step"] for row in found if "train/loss" in row] == [3, 6]
    assert "train/loss" in read[-1]  # the trainer's own row
    assert not any(name.startswith("train/persona") for row in found for name in row)
    assert axes["*"] == "train/global_step"
    assert alerts == [f"persona_probe: fire at step {FIRES}"]


def loop(watching: Any, log: Callable[[int], None]) -> None:
    """A loop that logs its own loss at every third step, at its start with nothing."""
    with watching.watch(make_model(), make_tokenizer()) as live:
        for step in range(1, STEPS + 1):
            if step % 3 == 0:
                log(step)
            live.step(step)


def test_wandb_in_a_loop_uses_up_no_step(offline: Path) -> None:
    import wandb

    run = wandb.init(project="loop")
    loop(alarming(sinks=[WandbSink()]), lambda step: run.log({"loss": float(step)}))
    run.log({"loss": 7.0})
    run.finish()
    wandb.teardown()
    found, alerts, axes = wandb_rows(offline)
    assert [row["persona/step"] for row in found if NAME in row] == WANTED
    assert axes["persona/*"] == "persona/step" and len(alerts) == 1
    # one reading came before the first log, and a second: only that one is a row of its own
    assert [row["loss"] for row in found if "loss" in row] == [3.0, 6.0, 7.0] and len(found) <= 5


def test_wandb_without_a_run_is_a_fault_that_says_what_to_do() -> None:
    watching = alarming(sinks=[WandbSink()])
    loop(watching, lambda step: None)
    assert [f.part for f in watching.faults] == ["sink 1 (WandbSink)"] and "wandb.init()" in watching.faults[0].message


def test_tensorboard_in_a_loop(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loop(alarming(sinks=[TensorBoardSink(tmp_path)]), lambda step: None)
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert steps(board, NAME) == steps(board, f"{NAME}_band_low") == WANTED == steps(board, "behaviour/behaviour")


@pytest.fixture
def trackio_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Where trackio keeps its database, read back by itself."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio import utils  # pyright: ignore
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore

    for module in (utils, __import__("trackio.sqlite_storage", fromlist=["x"])):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")

    def read() -> list[dict[str, Any]]:
        project = SQLiteStorage.get_projects()[0]
        return SQLiteStorage.get_logs(project, SQLiteStorage.get_runs(project)[0])

    yield read


def test_trackio_keeps_the_users_steps(
    trackio_rows: Callable[[], list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda *_: True)
    fit(tmp_path, "trackio", project="mine", trackio_static_space_id=False)
    found = trackio_rows()
    losses = [(row["step"], row["train/global_step"]) for row in found if "train/loss" in row]
    assert losses == [(0, 3), (1, 6)]  # as without a monitor
    assert sorted(row["train/global_step"] for row in found if NAME in row) == WANTED
    assert not any(name.startswith("train/persona") for row in found for name in row)


def test_trackio_in_a_loop_keeps_the_users_steps(trackio_rows: Callable[[], list[dict[str, Any]]]) -> None:
    import trackio  # pyright: ignore

    trackio.init(project="loop", name="mine")
    loop(alarming(sinks=[TrackioSink()]), lambda step: trackio.log({"loss": float(step)}))
    trackio.finish()
    found = trackio_rows()
    assert [(row["step"], row["loss"]) for row in found if "loss" in row] == [(0, 3.0), (1, 6.0)]
    assert sorted(row["persona/step"] for row in found if NAME in row) == WANTED


# --- Lightning


def test_lightning_logs_through_the_modules_logger(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    import pandas as pd
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import CSVLogger

    from persona_probe.monitor.lightning import LightningMonitor

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model().train()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.model(input_ids=batch, labels=batch).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    watching = alarming()
    data: Any = torch.utils.data.DataLoader(torch.randint(2, 258, (12, 10)), batch_size=2)  # pyright: ignore
    callbacks: Any = [LightningMonitor(watching, make_tokenizer())]
    settings: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = CSVLogger(tmp_path, name="mine", version=0)
        Trainer(callbacks=callbacks, logger=logger, accelerator="cpu", enable_checkpointing=False, **settings).fit(
            Module(), data
        )
    table = pd.read_csv(tmp_path / "mine/version_0/metrics.csv")
    read = table.dropna(subset=[NAME])
    assert read["step"].tolist() == WANTED and read["persona/alarms"].tolist() == [0, 0, 1, 1]
    assert watching.faults == []


# --- An alarm speaks by itself


def test_an_alarm_is_logged_and_a_default_band_says_once_that_it_is_not_calibrated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from persona_probe.monitor.rules.bands import OutsideBand
    from persona_probe.monitor.rules.rule import AllOf, Not

    watching = directions(every=1, rules=[FireAt(1), OutsideBand(), AllOf(Not(OutsideBand(1)))])
    for _ in range(2):
        with watching.watch(make_model(), make_tokenizer()) as live:
            live.step(1)
    assert caplog.text.count("step 1, fire: told to") == 2
    assert caplog.text.count("not calibrated") == 1 and "persona-probe monitor calibrate" in caplog.text
    caplog.clear()
    given = directions(
        every=1, rules=[OutsideBand(band_sd=2.0), FireAt(1)], actions=[LogAlarm(only_for=["not finite"])]
    )
    with given.watch(make_model(), make_tokenizer()) as live:
        live.step(1)
    assert "not calibrated" not in caplog.text and "told to" not in caplog.text


def test_log_false_sends_nothing_to_trackers() -> None:
    assert not any(isinstance(sink, AlertSink) for sink in directions(log=False).hub.sinks)


def test_a_tracker_that_fails_in_the_trainers_log_is_a_fault_and_training_goes_on(tmp_path: Path) -> None:
    from transformers.integrations import TensorBoardCallback  # pyright: ignore

    class Writer:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *args, **kwargs: None

        def add_scalar(self, name: str, *args: Any) -> None:
            if name.startswith("persona"):
                raise OSError("no space")

    watching = directions(every=1, log=True)
    trainer = sft(tmp_path, TensorBoardCallback(Writer()), watching)
    trainer.train()
    assert trainer.state.global_step == 3 and [f.message for f in watching.faults] == ["OSError: no space"]
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3]
