"""Actions do what they say to real optimizers, schedulers, loops and trainers."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerControl

from persona_probe.config import Training
from persona_probe.errors import InputError
from persona_probe.finetune.sft import with_adapter
from persona_probe.models.adapters import is_adapter
from persona_probe.monitor.actions.action import Action, ActionContext, CallBack, LogAlarm, StopTraining, check_actions
from persona_probe.monitor.actions.checkpoint import SaveCheckpoint
from persona_probe.monitor.actions.learning_rate import LowerLearningRate
from persona_probe.monitor.actions.rollback import RollBack
from persona_probe.monitor.rules.bands import OutsideBand
from persona_probe.monitor.rules.change import Cusum
from persona_probe.monitor.rules.rule import AnyOf
from tests.factories import copied_state, make_model, same_state
from tests.monitor.action_runs import ALARM, Driver, train


class Loop:
    """A monitor of a plain loop, as far as actions know it."""

    def __init__(self) -> None:
        self.stopped = 0

    def request_stop(self) -> None:
        self.stopped += 1


def test_an_alarm_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    LogAlarm().act(ALARM, ActionContext(3, nn.Linear(1, 1)))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "step 3, outside band: 'persona' was outside its band"


def test_a_function_is_called_back() -> None:
    seen: list[Any] = []
    context = ActionContext(3, nn.Linear(1, 1))
    CallBack(lambda alarm, where: seen.append((alarm, where))).act(ALARM, context)
    assert seen == [(ALARM, context)]


def test_an_action_may_be_for_some_rules_only() -> None:
    seen: list[str] = []
    for names in (None, ("outside band",), ("cusum",), ()):
        CallBack(lambda alarm, where, n=names: seen.append(str(n)), only_for=names).act(
            ALARM, ActionContext(3, nn.Linear(1, 1))
        )
    assert seen == ["None", "('outside band',)"]


def test_rules_that_are_not_there_are_refused() -> None:
    rules = [OutsideBand(), AnyOf(Cusum(), name="change")]
    check_actions(rules, [LogAlarm(), StopTraining(only_for=["outside band", "change"])])
    with pytest.raises(InputError, match="only_for of StopTraining 'outside bnad': did you mean 'outside band'"):
        check_actions(rules, [StopTraining(only_for=["outside bnad"])])


def test_what_changes_training_is_for_every_process() -> None:
    everywhere: list[Action] = [SaveCheckpoint(), StopTraining(), LowerLearningRate(), RollBack()]
    assert all(action.every_rank for action in everywhere)
    assert not LogAlarm().every_rank and not CallBack(print).every_rank and CallBack(print, ranks=True).every_rank


def test_training_is_stopped_where_it_can_be() -> None:
    loop, control = Loop(), TrainerControl()
    StopTraining().act(ALARM, ActionContext(3, nn.Linear(1, 1), monitor=loop, control=control))
    assert control.should_training_stop and loop.stopped == 0
    StopTraining().act(ALARM, ActionContext(3, nn.Linear(1, 1), monitor=loop))
    assert loop.stopped == 1


def test_a_trainer_stops_and_saves(tmp_path: Path) -> None:
    driver = Driver([StopTraining()], alarms=[3])
    assert train(tmp_path, make_model(), driver).state.global_step == 3
    saver = Driver([SaveCheckpoint()], alarms=[2])
    trainer = train(tmp_path, make_model(), saver)
    assert trainer.state.global_step == 5
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert same_state(copied_state(saved), saver.weights[2])
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()


@pytest.mark.parametrize("step", [0, 5])
def test_what_a_trainer_would_not_save_is_written_at_once(tmp_path: Path, step: int) -> None:
    driver = Driver([SaveCheckpoint()], alarms=[step])
    train(tmp_path, make_model(), driver)
    assert [p.name for p in tmp_path.iterdir()] == [f"alarm-step-{step}"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / f"alarm-step-{step}")
    assert same_state(copied_state(saved), driver.weights[step])


def test_bad_weights_are_kept_beside_a_rollback(tmp_path: Path) -> None:
    actions = [SaveCheckpoint(folder=tmp_path / "kept"), RollBack()]
    driver = Driver(actions, alarms=[3], cleans=[1])
    train(tmp_path / "run", make_model(), driver)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "kept" / "alarm-step-3")
    assert same_state(copied_state(saved), driver.weights_before[3])
    assert not same_state(driver.weights_before[3], driver.weights[3])


def test_a_plain_loop_saves_models_adapters_and_modules(tmp_path: Path) -> None:
    training = Training(rank=2, alpha=4, steps=1, checkpoints=())
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plain[1].weight = plain[0].weight
    for name, model in (("full", make_model()), ("lora", with_adapter(make_model(), training, 0)), ("module", plain)):
        context = ActionContext(3, model, checkpoint_folder=tmp_path / name)
        SaveCheckpoint().act(ALARM, context)
        SaveCheckpoint().act(ALARM, context)
        assert [p.name for p in (tmp_path / name).iterdir()] == ["alarm-step-3"]
    assert is_adapter(tmp_path / "lora" / "alarm-step-3")
    saved = load_file(tmp_path / "module" / "alarm-step-3" / "model.safetensors")
    assert torch.equal(saved["0.bias"], plain.state_dict()["0.bias"])
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "alarm-step-3")
    assert same_state(copied_state(full), copied_state(make_model()))


def test_a_wrapped_model_is_saved_as_it_is_below(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    SaveCheckpoint(tmp_path).act(ALARM, ActionContext(3, nn.DataParallel(torch.compile(model))))  # pyright: ignore
    saved = load_file(tmp_path / "alarm-step-3" / "model.safetensors")
    assert same_state(saved, copied_state(model))


def test_saving_needs_a_folder_that_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pass SaveCheckpoint\(folder=...\)"):
        SaveCheckpoint().act(ALARM, ActionContext(3, nn.Linear(1, 1)))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"could not write .*alarm-step-3"):
        SaveCheckpoint(tmp_path / "file").act(ALARM, ActionContext(3, nn.Linear(1, 1)))
