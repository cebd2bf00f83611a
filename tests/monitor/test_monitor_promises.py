"""The monitor never hurts the run and never says what is not so, one member of each kind of fault."""

import errno
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from persona_probe.errors import InputError
from persona_probe.monitor.actions.action import Action, ActionContext, CallBack, StopTraining
from persona_probe.monitor.actions.rollback import RollBack
from persona_probe.monitor.events import NOT_FINITE, Alarm, Reading
from persona_probe.monitor.rules.bands import OutsideBand
from persona_probe.monitor.rules.explained_variance import ExplainedVarianceFloor
from persona_probe.monitor.rules.rule import AllOf, Not
from persona_probe.monitor.sinks.files import read_events
from tests.factories import copied_state, hook_count, make_model, make_tokenizer, same_state
from tests.monitor.monitored_runs import FireAt, KeepEvents, directions, loop, monitor, sft

STEPS = 4


def spoil(model: nn.Module, value: float = math.nan, layer: int = 0) -> None:
    """Make a weight of a layer NaN, as a step that diverged does."""
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if f"layers.{layer}.mlp" in n).view(-1)[0] = value


def diverging(watching: Any, at: int = 2, layer: int = 0) -> nn.Module:
    """A loop whose step `at` leaves NaN."""
    model = make_model()
    with watching.watch(model, make_tokenizer()) as live:
        for step in range(1, STEPS + 1):
            if step == at:
                spoil(model, layer=layer)
            live.step(step)
    return model


RULES = {
    "none": lambda: [],
    "band": lambda: [OutsideBand(k=2)],
    "up": lambda: [OutsideBand(k=1, side="up")],
    "all of": lambda: [AllOf(OutsideBand(1), Not(ExplainedVarianceFloor()))],
}


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
@pytest.mark.parametrize("rules", list(RULES))
def test_nan_is_an_alarm_and_never_clean(rules: str, architecture: str, tmp_path: Path) -> None:
    back, path = RollBack(), tmp_path / "events.jsonl"
    watching = monitor(architecture=architecture, every=1, rules=RULES[rules](), actions=[back], path=path, fit_every=3)
    model = diverging(watching)
    assert watching.faults == []
    assert watching.alarms[0].rule == NOT_FINITE and watching.alarms[0].step == 2
    assert watching.readings.groupby("step")["finite"].all().tolist()[:3] == [True, True, False]
    assert all(bool(p.isfinite().all()) for p in model.parameters()) and back.clean_step != 2
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["finite"] for line in lines if line["event"] == "reading"][:3] == [True, True, False]
    read = [event for event in read_events(path) if isinstance(event, Reading)]
    assert [event.finite for event in read][:3] == [True, True, False]


def test_an_older_file_says_by_its_nulls_what_was_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    diverging(directions(every=1, path=path))
    old = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "finite"}) + "\n" for r in old))
    assert [e.finite for e in read_events(path) if isinstance(e, Reading)] == [True, True, False, False, False]


def test_weights_above_the_layer_that_is_read_are_not_kept_as_clean() -> None:
    back = RollBack()
    watching = directions(every=1, rules=[OutsideBand(band_sd=9.0)], actions=[back])
    diverging(watching, at=2, layer=2)
    assert watching.readings["finite"].all() and back.clean_step == 1


def test_moments_that_are_not_finite_are_not_kept_as_clean() -> None:
    model, back = make_model(), RollBack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    with directions(every=1, actions=[back]).watch(model, make_tokenizer(), optimizer=optimizer) as live:
        for step in (1, 2):
            model(input_ids=torch.arange(2, 10)[None], labels=torch.arange(2, 10)[None]).loss.backward()
            optimizer.step()
            if step == 2:
                next(iter(optimizer.state.values()))["exp_avg"].view(-1)[0] = math.inf
            live.step(step)
    assert back.clean_step == 1


def test_a_passive_reading_knows_what_is_not_finite_and_padding_does_not_count() -> None:
    model, watching = make_model().train(), directions(mode="passive", every=1)
    with watching.watch(model, make_tokenizer()) as live:
        for step in (1, 2):
            spoil(model, math.nan if step == 2 else 0.1)
            model(input_ids=torch.arange(2, 10)[None], labels=torch.arange(2, 10)[None])
            live.step(step)
    assert watching.readings["finite"].tolist() == [True, False]
    assert [alarm.rule for alarm in watching.alarms] == [NOT_FINITE]


# --- Rules, sinks and actions that misbehave in every way


class InsideRaises(FireAt):
    inside = property(lambda self: 1 / 0)


class Answers(FireAt):
    """Answers with what is no alarm."""

    def update(self, reading: Reading) -> Any:
        return super().update(reading) and "fire!"


class SaysNothing(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Speechless(FireAt):
    def update(self, reading: Reading) -> Any:
        raise SaysNothing


class NeverEverywhere(Action):
    every_rank = property(lambda self: 1 / 0)

    def _do(self, alarm: Alarm, context: ActionContext) -> None: ...


@pytest.mark.parametrize("mode", ["probe", "passive", "both"])
@pytest.mark.parametrize("rule", [InsideRaises, Answers, Speechless])
def test_a_rule_that_fails_is_off_and_no_state_is_clean_from_then_on(rule: type[FireAt], mode: str) -> None:
    model, back = make_model(), RollBack()
    watching = directions(every=1, mode=mode, rules=[rule(2)], actions=[back, NeverEverywhere()])
    with watching.watch(model, make_tokenizer()) as live:
        loop(model, STEPS, live)
    assert [f.part for f in watching.faults if f.part.startswith("rule")] == [f"rule 1 ({rule.__name__})"]
    assert watching.readings["step"].max() == STEPS and (back.clean_step or 0) < 2


class CloseRaises(KeepEvents):
    def close(self) -> None:
        raise OSError("cannot close")


def test_all_sinks_are_closed_and_none_is_opened_again(tmp_path: Path) -> None:
    first, last = KeepEvents(), KeepEvents()
    watching = directions(every=1, sinks=[first, CloseRaises(), last], path=tmp_path / "events.jsonl")
    with watching.watch(make_model(), make_tokenizer()):
        pass
    assert first.closed == last.closed == 1 and [f.message for f in watching.faults] == ["OSError: cannot close"]
    assert watching.hub.sinks[0]._file is None  # pyright: ignore
    with (
        pytest.raises(OSError),
        directions(sinks=[CloseRaises(), last], on_error="raise").watch(make_model(), make_tokenizer()),
    ):
        pass
    assert last.closed == 2


class Untidy(KeepEvents):
    """Draws random numbers, turns gradients off and changes the default dtype."""

    def emit(self, event: Any) -> None:
        np.random.rand(3)
        torch.randn(3)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)


def untidy(_step: Any, _snapshot: Any = None, model: Any = None) -> float:
    model = _step if model is None else model
    torch.randn(3)
    model.train(not model.training)
    next(model.parameters()).requires_grad_(False)
    model.model.layers[0].register_forward_hook(lambda *_: _[2] * 0)
    raise RuntimeError("half done")


def test_what_parts_leave_behind_is_put_back() -> None:
    def run(watch: bool) -> dict[str, torch.Tensor]:
        model = make_model()
        act = CallBack(lambda alarm, context: Untidy().emit(None))
        settings = {"sinks": [Untidy()], "on_reading": untidy, "behaviour": untidy, "rules": [FireAt(1)]}
        watching = directions(every=1, actions=[act], **settings)
        if not watch:
            return loop(model)
        with watching.watch(model, make_tokenizer()) as live:
            state = loop(model, live=live)
        assert {f.part for f in watching.faults} == {"on_reading", "behaviour 'behaviour'"}
        assert hook_count(model) == 0
        return state

    assert same_state(run(True), run(False))
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


def test_a_monitor_that_an_action_closes_leaves_the_loop_alone() -> None:
    model = make_model()
    watching = directions(every=1, rules=[FireAt(2)], actions=[CallBack(lambda a, c: c.monitor.close())])
    with watching.watch(model, make_tokenizer()) as live:
        loop(model, STEPS, live)
    assert watching.readings["step"].tolist() == [0, 1, 2] and hook_count(model) == 0


def test_a_reading_inside_a_reading_is_refused_and_told() -> None:
    model = make_model()
    watching = directions(every=1, on_reading=lambda step, snapshot, m: watching.read(m, step))
    with watching.watch(model, make_tokenizer()) as live:
        loop(model, 2, live)
    assert [f.part for f in watching.faults] == ["on_reading"] and "going on" in watching.faults[0].message
    assert watching.readings["step"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("loss", ["nan", "1.5", "n/a", None, torch.ones(2), torch.tensor(2.0), object()])
def test_a_loss_may_be_anything(loss: Any) -> None:
    watching = directions(every=1)
    with watching.watch(make_model(), make_tokenizer()) as live:
        live.training.note({"loss": loss, "learning_rate": loss})  # pyright: ignore
        live.step(1)
    assert watching.faults == [] and watching.readings["step"].tolist() == [0, 1]


# --- One run at a time


def test_a_nested_watch_is_refused_and_the_outer_run_goes_on(tmp_path: Path) -> None:
    kept = KeepEvents()
    model, watching = make_model(), directions(every=1, mode="both", sinks=[kept])
    alone = directions(every=1)
    with watching.watch(model, make_tokenizer()) as live, alone.watch(model, make_tokenizer()):
        with pytest.raises(InputError, match="already watches"), watching.watch(make_model(), make_tokenizer()):
            raise AssertionError
        with pytest.raises(InputError, match="already watches"):
            sft(tmp_path, watching, model=make_model()).train()
        loop(model, 2, live)
    assert watching.readings.query("mode == 'passive'")["step"].tolist() == [1, 2] and hook_count(model) == 0
    assert [type(e).__name__ for e in kept.events].count("Start") == 1 and kept.closed == 1
    with watching.watch(model, make_tokenizer()):
        pass
    assert watching.readings["step"].tolist() == [0]


def test_a_trainer_that_is_watched_is_not_interrupted(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    refused: list[str] = []

    class Meanwhile(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                for begin in (lambda: watching.watch(make_model()).__enter__(), other):
                    try:
                        begin()
                    except InputError as error:
                        refused.append(str(error))

    def other() -> None:
        sft(tmp_path / "b", watching, model=make_model()).train()

    watching = directions(every=1)
    sft(tmp_path / "a", watching, watching, Meanwhile(), model=make_model()).train()
    assert len(refused) == 2 and watching.readings["step"].tolist() == [0, 1, 2, 3] and watching.faults == []


# --- A disk that is full


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parquet files end half-way with "no space left"."""
    import pandas as pd

    def half(self: Any, path: Any, **_: Any) -> None:
        Path(path).write_bytes(b"PAR1half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", half)
        yield


def test_a_full_disk_leaves_no_half_file_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, watching = make_model(), directions(every=1, values_path=tmp_path / "values", actions=[StopTraining()])
    with watching.watch(model, make_tokenizer()) as live, full_disk(monkeypatch):
        loop(model, 3, live)
    assert [f.part for f in watching.faults] == ["values_path"] and "space" in watching.faults[0].message
    assert [p.name for p in (tmp_path / "values").iterdir()] == ["probe-00000000.parquet"]
    assert watching.readings["step"].tolist() == [0, 1, 2, 3]


def test_the_monitor_itself_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from persona_probe.monitor import monitored_run

    def broken(*_: Any) -> Any:
        raise RuntimeError("a mistake of ours")

    model, plain = make_model(), make_model()
    watching = directions(every=1, mode="both")
    with watching.watch(model, make_tokenizer()) as live:
        monkeypatch.setattr(monitored_run.WeightSample, "values", broken)
        loop(model, STEPS, live)
        assert hook_count(model) == 0
    loop(plain, STEPS)
    assert [f.part for f in watching.faults] == ["monitor"] and same_state(copied_state(model), copied_state(plain))
