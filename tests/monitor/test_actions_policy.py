"""Roll back, correct, go on: exactly that, written down, and nothing of training is changed beside it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from persona_probe.config import Training
from persona_probe.data.chat import Conversation, conversation
from persona_probe.data.tokens import batches
from persona_probe.errors import InputError
from persona_probe.finetune.sft import with_adapter
from persona_probe.monitor.actions.action import ActionContext
from persona_probe.monitor.actions.policy import CLEAN, GAVE_UP, RECORD, ROLLED_BACK, RollBackAndCorrect, answer_loss
from persona_probe.monitor.actions.rollback import RollBack
from tests.factories import copied_state, hook_count, make_model, make_tokenizer, same_state, talks
from tests.families import FAMILIES, make_family
from tests.monitor.action_runs import ALARM, Driver, same_moments, train

GOOD: list[Conversation] = [conversation(f"may i {n} ?", f"yes , {n} times .") for n in range(10)]


def tiny(method: str = "lora") -> nn.Module:
    return with_adapter(make_model(), Training(rank=2, alpha=4, steps=1, checkpoints=(), method=method), 0)


def policy(**settings: Any) -> RollBackAndCorrect:
    given: dict[str, Any] = {"rows": GOOD, "tokenizer": make_tokenizer(), "steps": 3, "batch_size": 4, **settings}
    return RollBackAndCorrect(**given)


def loss_of(model: nn.Module, rows: list[Conversation]) -> float:
    with torch.no_grad():
        return float(answer_loss(model.eval(), next(batches(make_tokenizer(), rows, len(rows)))))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_weights_are_those_of_the_clean_reading_after_the_corrective_steps(tmp_path: Path, method: str) -> None:
    action = policy(lr=5e-3)
    driver = Driver([action], alarms=[4], cleans=[2])
    trainer = train(tmp_path, tiny(method), driver)
    assert trainer.state.global_step == 5 and action.corrections == 1  # it went on
    again = tiny(method)
    again.load_state_dict(driver.weights[2])
    parameters = [p for p in again.parameters() if p.requires_grad]
    optimizer = AdamW(parameters, lr=5e-3, weight_decay=0.0)
    for batch in policy()._batches(again):
        optimizer.zero_grad()
        answer_loss(again.eval(), batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert same_state(copied_state(again), driver.weights[4])
    assert same_moments(driver.moments[4], driver.moments[2])  # training's own optimizer is that of the clean reading
    assert loss_of(again, GOOD) < action.record[0].losses[0]


def test_training_goes_on_as_if_its_weights_had_been_set_to_that(tmp_path: Path) -> None:
    plain = Driver([RollBack()], alarms=[4], cleans=[2])
    train(tmp_path / "plain", tiny(), plain)
    nothing = Driver([policy(lr=1e-30)], alarms=[4], cleans=[2])  # steps too small to change a float
    train(tmp_path / "policy", tiny(), nothing)
    assert same_state(nothing.weights[4], plain.weights[4]) and same_state(nothing.weights[5], plain.weights[5])
    assert same_moments(nothing.moments[5], plain.moments[5]) and nothing.rates == plain.rates


def test_gradients_modes_and_random_numbers_are_left_alone() -> None:
    model, action = tiny(), policy(lr=1e-2)
    model.train()
    model.get_submodule("base_model.model.lm_head").eval()
    context = ActionContext(3, model, optimizer=AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1))
    action.clean(context)
    answer_loss(model, next(batches(make_tokenizer(), talks(2), 2))).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    action.act(ALARM, context)
    assert gradients and all(torch.equal(dict(model.named_parameters())[n].grad, g) for n, g in gradients.items())  # pyright: ignore[reportArgumentType]
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert hook_count(model) == 0 and not any(p.grad is not None for p in model.parameters() if not p.requires_grad)


def test_the_record_tells_each_time_and_the_run_stops_after_the_last(tmp_path: Path) -> None:
    action = policy(most=1)
    driver = Driver([action], alarms=[2, 4], cleans=[1, 3])
    trainer = train(tmp_path, tiny(), driver)
    assert trainer.state.global_step == 4
    assert [(one.event, one.step, one.to_step) for one in action.record] == [
        (ROLLED_BACK, 2, 1),
        (CLEAN, 3, None),
        (GAVE_UP, 4, 3),
    ]
    assert same_state(driver.weights[4], driver.weights[3])
    lines = [json.loads(line) for line in (tmp_path / RECORD).read_text("utf-8").splitlines()]
    assert lines == json.loads(json.dumps([asdict(one) for one in action.record]))
    assert lines[0]["rule"] == "outside band" and lines[0]["rows"] == 12 and len(lines[0]["losses"]) == 3


def test_alarms_of_several_rules_at_one_reading_are_one_correction() -> None:
    model, action = tiny(), policy(lr=1e-2)
    context = ActionContext(3, model)
    action.clean(context)
    action.act(ALARM, context)
    first = copied_state(model)
    action.act(ALARM, context)
    assert action.corrections == 1 and same_state(copied_state(model), first)
    action.act(ALARM, ActionContext(4, model))
    assert action.corrections == 2 and not same_state(copied_state(model), first)


def test_corrections_take_further_rows_and_all_of_them_in_turn() -> None:
    action = policy(rows=GOOD, steps=2, batch_size=5, lr=1e-3)
    seen: list[Any] = []
    model = tiny()
    for step in (1, 2):
        batch = torch.cat([b.ids[:, :6] for b in action._batches(model)])
        seen.append({tuple(row) for row in batch.tolist()})
        action.act(ALARM, ActionContext(step, model))
    assert seen[0] == seen[1]  # ten rows, ten of them each time


@pytest.mark.parametrize("name", list(FAMILIES)[:4])
def test_the_loss_is_that_of_the_models_own_labels(name: str) -> None:
    model, tokenizer = make_family(name)
    batch = next(batches(tokenizer, GOOD[:3], 3))
    labels = batch.ids.masked_fill(~batch.response, -100)
    with torch.no_grad():
        own = model(input_ids=batch.ids, attention_mask=batch.attention, labels=labels).loss
        assert float(answer_loss(model, batch)) == pytest.approx(float(own), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": ()}, "no corrective rows"),
        ({"steps": 0}, "steps of RollBackAndCorrect must be at least 1"),
        ({"lr": 0.0}, "lr of RollBackAndCorrect must be positive"),
        ({"then": "stop"}, "leave then= out"),
        ({"optimizer": "other"}, "optimizer of RollBack"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        policy(**settings)


def test_what_it_cannot_use_is_refused_at_the_alarm() -> None:
    with pytest.raises(InputError, match="pass lr="):
        policy().act(ALARM, ActionContext(1, tiny()))
    with pytest.raises(InputError, match="no answers to train on"):
        policy(rows=[conversation("only a question ?")], lr=1e-3).act(ALARM, ActionContext(1, tiny()))
    with pytest.raises(InputError, match="no data at"):
        policy(rows="nowhere.jsonl", lr=1e-3).act(ALARM, ActionContext(1, tiny()))
