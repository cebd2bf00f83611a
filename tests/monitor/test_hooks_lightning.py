"""The Lightning callback: a thin adapter around the monitor."""

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.factories import copied_state, hook_count, make_model, make_tokenizer, same_state
from tests.monitor.monitored_runs import FireAt, KeepEvents, directions

pytest.importorskip("lightning", reason="Lightning is not installed")
from lightning.pytorch import Callback, LightningModule, Trainer

from persona_probe.monitor.actions.action import StopTraining
from persona_probe.monitor.events import End
from persona_probe.monitor.lightning import LightningMonitor


class Module(LightningModule):
    """The tiny model, trained on all tokens."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        # Lightning keeps the mode that a module comes in.
        self.model, self.fail_at, self.losses = make_model().train(), fail_at, list[float]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.fail_at:
            raise ZeroDivisionError
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(folder: Path, module: Module, *callbacks: Any, **arguments: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = torch.randint(2, 258, (12, 10), generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "logger": False, **arguments}
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            default_root_dir=folder, callbacks=list(callbacks), enable_checkpointing=False, **settings, **quiet
        )
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))  # pyright: ignore[reportArgumentType]
    return trainer


def test_it_reads_at_optimizer_steps_and_changes_nothing(tmp_path: Path) -> None:
    watching, watched, plain = directions(mode="both", every=1, sinks=[KeepEvents()]), Module(), Module()
    fit(tmp_path, watched, LightningMonitor(watching, make_tokenizer()), accumulate_grad_batches=2)
    fit(tmp_path, plain, accumulate_grad_batches=2)
    assert watching.faults == [] and hook_count(watched) == 0
    assert same_state(copied_state(watched), copied_state(plain))
    probes, passive = (watching.readings.query(f"mode == '{mode}'") for mode in ("probe", "passive"))
    assert probes["step"].tolist() == [0, 1, 2, 3]
    assert passive["step"].tolist() == [1, 2, 3] and passive["n_probes"].tolist() == [4, 4, 4]
    assert passive["tokens_seen"].tolist() == [40, 80, 120]
    assert probes["loss"].tolist()[1:] == pytest.approx(watched.losses[1::2], rel=1e-5)
    assert probes["learning_rate"].tolist() == [1e-3] * 4
    assert isinstance(watching.hub.sinks[0].events[-1], End)  # pyright: ignore


def test_an_alarm_stops_it(tmp_path: Path) -> None:
    watching = directions(every=1, rules=[FireAt(2)], actions=[StopTraining()])
    trainer = fit(tmp_path, Module(), LightningMonitor(watching, make_tokenizer()))
    assert trainer.global_step == 2 and [a.step for a in watching.alarms] == [2]


def test_hooks_go_when_training_raises(tmp_path: Path) -> None:
    watching, module = directions(mode="both", every=1), Module(fail_at=2)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, LightningMonitor(watching, make_tokenizer()))
    assert hook_count(module) == 0 and watching.readings["step"].unique().tolist() == [0, 1, 2]


class Averaging(Callback):
    """Puts other weights in at the end, as Lightning's callbacks that average do."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for parameter in pl_module.parameters():
            parameter.data.mul_(0.5)


def test_the_last_step_is_read_before_weights_are_averaged(tmp_path: Path) -> None:
    plain, averaged = directions(every=100), directions(every=100)
    fit(tmp_path, Module(), LightningMonitor(plain, make_tokenizer()))
    fit(tmp_path, Module(), Averaging(), LightningMonitor(averaged, make_tokenizer()))
    assert plain.readings["step"].tolist() == averaged.readings["step"].tolist() == [0, 6]
    assert plain.readings["mean"].tolist() == averaged.readings["mean"].tolist()
