"""A rollback is exact: weights and optimizer are those of the last clean reading, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from persona_probe.config import Training
from persona_probe.errors import InputError
from persona_probe.finetune.sft import with_adapter
from persona_probe.monitor.actions.action import ActionContext
from persona_probe.monitor.actions.rollback import InMemory, OnDisk, RollBack, local
from tests.factories import copied_state, make_model, same_state
from tests.monitor.action_runs import ALARM, Driver, moments, same_moments, train


def tiny(method: str = "full") -> nn.Module:
    return with_adapter(make_model(), Training(rank=2, alpha=4, steps=1, checkpoints=(), method=method), 0)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_a_trainer_is_rolled_back_bit_for_bit(tmp_path: Path, method: str, keep: str) -> None:
    action = RollBack(keep=keep)
    driver = Driver([action], alarms=[4], cleans=[1, 2])
    trainer = train(tmp_path, tiny(method), driver)
    assert trainer.state.global_step == 5 and action.clean_step == 2
    assert same_state(driver.weights[4], driver.weights[2])
    assert same_moments(driver.moments[4], driver.moments[2]) and driver.moments[2]
    assert not same_state(driver.weights_before[4], driver.weights[2])
    assert not same_state(driver.weights[5], driver.weights[2])
    assert (tmp_path / "last-clean.safetensors").is_file() == (keep == "disk")


def test_training_may_stop_there(tmp_path: Path) -> None:
    driver = Driver([RollBack(then="stop")], alarms=[4], cleans=[2])
    trainer = train(tmp_path, tiny(), driver)
    assert trainer.state.global_step == 4
    assert trainer.model is not None and same_state(copied_state(trainer.model), driver.weights[2])


def test_back_to_the_start_has_no_moments(tmp_path: Path) -> None:
    driver = Driver([RollBack()], alarms=[3], cleans=[0])
    train(tmp_path, tiny(), driver)
    assert same_state(driver.weights[3], driver.weights[0])
    assert driver.moments[3] == {} and driver.moments[4]


def test_without_a_clean_reading_nothing_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver([RollBack(then="stop")], alarms=[2])
    assert train(tmp_path, tiny(), driver).state.global_step == 2
    assert same_state(driver.weights[2], driver.weights_before[2])
    assert "nothing to roll back to" in caplog.text


def step_on(model: nn.Module, optimizer: Optimizer, seeds: range) -> None:
    """Optimizer steps on made-up data, one batch a seed."""
    for seed in seeds:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def shift(model: nn.Module) -> None:
    """Add one to every weight."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


@pytest.mark.parametrize("keep", ["memory", "disk"])
@pytest.mark.parametrize(
    "kind",
    [
        (AdamW, {"lr": 0.1, "amsgrad": True}),
        (SGD, {"lr": 0.1, "momentum": 0.9}),
        (SGD, {"lr": 0.1}),
        (Adafactor, {"lr": 0.1}),
    ],
)
def test_the_same_steps_again_give_the_same_weights(tmp_path: Path, kind: Any, keep: str) -> None:
    model, action = small(), RollBack(keep=keep, folder=tmp_path)
    optimizer = kind[0](model.parameters(), **kind[1])
    context = ActionContext(3, model, optimizer=optimizer)
    step_on(model, optimizer, range(3))
    action.clean(context)
    step_on(model, optimizer, range(3, 6))
    first, before = copied_state(model), moments(model, optimizer)
    action.act(ALARM, context)
    assert not same_state(copied_state(model), first)
    step_on(model, optimizer, range(3, 6))
    assert same_state(copied_state(model), first) and same_moments(moments(model, optimizer), before)


def test_the_optimizer_may_be_reset_or_kept() -> None:
    for choice in ("reset", "keep"):
        model, action = small(), RollBack(optimizer=choice)
        optimizer = AdamW(model.parameters(), lr=0.1)
        step_on(model, optimizer, range(3))
        action.clean(ActionContext(3, model, optimizer=optimizer))
        clean = copied_state(model)
        step_on(model, optimizer, range(3, 6))
        before = moments(model, optimizer)
        action.act(ALARM, ActionContext(6, model, optimizer=optimizer))
        assert same_state(copied_state(model), clean)
        assert same_moments(moments(model, optimizer), {} if choice == "reset" else before)


def test_only_what_trains_is_put_back_and_one_copy_is_kept() -> None:
    model, action = small(), RollBack()
    model[0].requires_grad_(False)
    context = ActionContext(1, model)
    action.clean(context)
    state = action._clean.state
    assert isinstance(state, InMemory)
    places = {name: tensor.data_ptr() for name, tensor in state._tensors.items()}
    assert sorted(places) == ["weights|2.bias", "weights|2.weight"]
    shift(model)
    action.clean(context)
    kept = copied_state(model)
    assert {name: tensor.data_ptr() for name, tensor in state._tensors.items()} == places
    shift(model)
    action.act(ALARM, context)
    now = copied_state(model)
    assert torch.equal(now["2.weight"], kept["2.weight"]) and torch.equal(now["0.weight"], kept["0.weight"] + 1)


def test_another_models_state_is_not_put_back(caplog: pytest.LogCaptureFixture) -> None:
    action, one, other = RollBack(), small(), nn.Linear(3, 4)
    action.clean(ActionContext(1, one))
    before = copied_state(other)
    action.act(ALARM, ActionContext(2, other))
    assert same_state(copied_state(other), before) and "nothing to roll back to" in caplog.text
    action.clean(ActionContext(3, other))
    shift(other)
    action.act(ALARM, ActionContext(4, other))
    assert same_state(copied_state(other), before)


def test_a_changed_model_is_refused_whole() -> None:
    model, action = small(), RollBack()
    action.clean(ActionContext(1, model))
    shift(model)
    model[2] = nn.Linear(4, 7)
    before = copied_state(model)
    with pytest.raises(InputError, match=r"parameter '2\.weight' changed its shape"):
        action.act(ALARM, ActionContext(2, model))
    assert same_state(copied_state(model), before)


def test_a_state_that_was_not_copied_whole_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, action = small(), RollBack(keep="disk", folder=tmp_path / "deep")
    action.clean(ActionContext(1, model))
    (tmp_path / "deep" / "last-clean.safetensors").unlink()
    with pytest.raises(InputError, match="cannot read the clean state"):
        action.act(ALARM, ActionContext(2, model))
    memory = InMemory()
    memory.take(model, None, 1)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory.take(model, None, 2)
    assert memory.step is None


def test_what_disk_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.state[next(model.parameters())]["function"] = print
    with pytest.raises(InputError, match="keep it in memory"):
        OnDisk(tmp_path / "clean.safetensors").take(model, optimizer, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_rollback_is_exact_for_a_process_part_of_sharded_weights() -> None:
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh, model, action = init_device_mesh("cpu", (1,)), small(), RollBack()
        for layer in (model[0], model[2]):
            for name in ("weight", "bias"):
                whole = getattr(layer, name).detach()
                setattr(layer, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
        optimizer = AdamW(model.parameters(), lr=0.1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        context = ActionContext(1, model, optimizer=optimizer)
        action.clean(context)
        clean = [(local(p).clone(), local(optimizer.state[p]["exp_avg"]).clone()) for p in model.parameters()]
        optimizer.step()
        assert not any(torch.equal(local(p), w) for p, (w, _) in zip(model.parameters(), clean, strict=True))
        action.act(ALARM, context)
        for parameter, (weight, moment) in zip(model.parameters(), clean, strict=True):
            assert torch.equal(local(parameter), weight)
            assert torch.equal(local(optimizer.state[parameter]["exp_avg"]), moment)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("settings", [{"keep": "disc"}, {"optimizer": "restored"}, {"then": "stopp"}])
def test_unknown_choices_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="did you mean"):
        RollBack(**settings)
