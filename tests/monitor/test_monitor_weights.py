"""A reading is of its own step's weights, and the base is never a half-trained model."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback

from persona_probe.errors import InputError
from persona_probe.monitor.events import End
from tests.factories import make_model, make_tokenizer
from tests.models.adapter_kinds import KINDS
from tests.monitor.monitored_runs import KeepEvents, adapted, directions, sft

BEST: dict[str, Any] = {
    **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_only_model": True},
    **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 9},
    "greater_is_better": True,  # the loss falls, so the first checkpoint stays the best
}


class Truth(TrainerCallback):
    """The mean of the direction after each step, read by a monitor of its own."""

    def __init__(self) -> None:
        self.means: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        one = directions(tokenizer=make_tokenizer())
        self.means[state.global_step] = float(one.read(kwargs["model"], 0).values.mean())


@pytest.mark.parametrize("make", [make_model, adapted])
def test_the_last_reading_is_of_the_last_step_not_of_the_best_checkpoint(make: Any, tmp_path: Path) -> None:
    truth, watching = Truth(), directions(every=100)
    patience = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = sft(tmp_path, truth, watching, patience, model=make(), **BEST)
    trainer.train()
    last = watching.readings.iloc[-1]
    best = int(str(trainer.state.best_model_checkpoint).rsplit("-", 1)[-1])
    assert best < last["step"] == max(truth.means) < 9
    assert last["mean"] == truth.means[int(last["step"])] != truth.means[best]


class Average(TrainerCallback):
    """Puts other weights into the model at the end, as callbacks that average do."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            if parameter.requires_grad:
                parameter.data.mul_(0.5)


class StopAt(TrainerCallback):
    """Ends training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_averaged_weights_are_not_read_as_the_last_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watching = directions(every=100, sinks=[KeepEvents()])
    sft(tmp_path, Average(), watching, StopAt(2), max_steps=9).train()
    assert watching.readings["step"].tolist() == [0] and "not those of step 2 any more" in caplog.text
    assert isinstance(watching.hub.sinks[0].events[-1], End)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_step_at_which_a_callback_stops_is_read(tmp_path: Path) -> None:
    truth, watching = Truth(), directions(every=100)
    sft(tmp_path, truth, watching, StopAt(2), max_steps=9).train()
    assert watching.readings["step"].tolist() == [0, 2]
    assert watching.readings["mean"].iloc[-1] == truth.means[2]


class RunsOutOfMemory(TrainerCallback):
    """Fails once, as a batch that does not fit does."""

    failed = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.parametrize("make", [make_model, adapted])
def test_a_restart_inside_train_keeps_the_base(make: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = directions()
    wanted.start(make(), make_tokenizer())
    watching, restart = directions(every=1, path=tmp_path / "readings.jsonl"), RunsOutOfMemory()
    sft(tmp_path, watching, restart, model=make(), auto_find_batch_size=True).train()
    assert restart.failed and wanted.base is not None and watching.base is not None
    assert np.array_equal(watching.base.values, wanted.base.values)
    assert ("its weights are no base" in caplog.text) == (make is make_model)
    first = watching.readings.iloc[0]
    assert first["base_mean"] == wanted.base.values.mean() and first["shift"] != 0


def biased() -> nn.Module:
    """A Qwen2 whose biases train."""
    from tests.models.adapter_kinds import base_model

    return peft.get_peft_model(base_model(), KINDS["bias all"]())  # pyright: ignore[reportArgumentType]


def test_biases_that_train_have_a_base_at_the_start_only(tmp_path: Path) -> None:
    model, watching = biased(), directions(every=1)
    sft(tmp_path, watching, model=model).train()
    assert watching.base is not None and watching.readings["shift"].iloc[-1] != 0
    with pytest.raises(InputError, match="pass the base model"):
        directions().start(model, make_tokenizer())
    given = directions(base=watching.base)
    given.start(model, make_tokenizer())
    assert given.read(model, 4).values.mean() == watching.readings["mean"].iloc[-1]


def test_reading_an_adapter_leaves_gradients_modes_and_the_active_adapter() -> None:
    model: Any = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    model.train()
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    before = {n: (p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    watching = directions()
    watching.start(model, make_tokenizer())
    watching.read(model, 1)
    assert model.active_adapters == ["other"] and all(m.training for m in model.modules())
    for name, parameter in model.named_parameters():
        flag, gradient = before[name]
        assert parameter.requires_grad == flag
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(gradient, parameter.grad)
