"""A tiny real Trainer whose steps raise alarms, for tests of actions."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from persona_probe.data.tokens import encode
from persona_probe.monitor.actions.action import Action, ActionContext
from persona_probe.monitor.events import Alarm
from tests.factories import copied_state, make_tokenizer, talks

ALARM = Alarm(3, "outside band", "persona", "'persona' was outside its band", 2.0, 1.0)


class Driver(TrainerCallback):
    """Calls actions as a monitor does, at chosen steps, and copies the weights before and after."""

    def __init__(self, actions: Sequence[Action], alarms: Collection[int] = (), cleans: Collection[int] = ()) -> None:
        self.actions, self.alarms, self.cleans = actions, alarms, cleans
        self.weights_before: dict[int, dict[str, Tensor]] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.moments: dict[int, dict[str, dict[str, Any]]] = {}
        self.rates: list[float] = []

    def _look(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, optimizer = state.global_step, kwargs["optimizer"]
        context = ActionContext(step, kwargs["model"], None, control, state, args, optimizer, kwargs["lr_scheduler"])
        self.weights_before[step] = copied_state(context.model)
        for action in self.actions:
            if step in self.cleans:
                action.clean(context)
            if step in self.alarms:
                action.act(Alarm(step, "outside band", "persona", "was outside", 2.0, 1.0), context)
        self.weights[step] = copied_state(context.model)
        self.moments[step] = moments(context.model, optimizer)
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(args, state, control, **kwargs)


def moments(model: nn.Module, optimizer: Any) -> dict[str, dict[str, Any]]:
    """A copy of the optimizer's state by parameter name."""
    copied = {}
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            copied[name] = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    return copied


def same_moments(left: dict[str, dict[str, Any]], right: dict[str, dict[str, Any]]) -> bool:
    """Whether two copies are equal bit for bit."""
    return left.keys() == right.keys() and all(
        left[n].keys() == right[n].keys() and all(torch.equal(left[n][k], right[n][k]) for k in left[n]) for n in left
    )


def train(folder: Path, model: nn.Module, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    """Five steps of transformers' own trainer."""
    tokenizer = make_tokenizer()
    rows = [encode(tokenizer, c).ids[:24] for c in talks()]
    wanted = {"max_steps": 5, "save_strategy": "no", "learning_rate": 1e-2, **settings}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **wanted,
    )
    data: Any = [{"input_ids": r, "labels": r} for r in rows]
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks)
    )
    trainer.train()
    return trainer
