"""What goes wrong in the monitor is told once and switched off; rules ask, actions act."""

from typing import Any

import pytest
import torch
from torch import nn

from persona_probe.errors import InputError
from persona_probe.monitor.actions.action import Action, ActionContext, CallBack, StopTraining
from persona_probe.monitor.events import Alarm, Behaviour, End, Fault, Reading, Start
from persona_probe.monitor.rules.bands import OutsideBand
from persona_probe.monitor.settings import BehaviourMeasurement, PassiveReading
from tests.factories import make_model, make_tokenizer, same_state
from tests.monitor.monitored_runs import FireAt, KeepEvents, directions, loop, sft


class Broken(KeepEvents):
    """A sink that cannot take readings."""

    def emit(self, event: Any) -> None:
        if isinstance(event, Reading):
            raise OSError("disk full")
        super().emit(event)


class BrokenRule(FireAt):
    def update(self, reading: Reading) -> Alarm | None:
        raise ValueError("what a rule")


def explode(*_: Any) -> float:
    raise RuntimeError("boom\nsecond line")


def watched(steps: int = 3, **kwargs: Any) -> Any:
    model, watching = make_model(), directions(every=1, **kwargs)
    with watching.watch(model, make_tokenizer()) as live:
        loop(model, steps, live)
    return watching


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"sinks": [Broken()]}, "sink 1 (Broken)"),
        ({"rules": [BrokenRule(1)]}, "rule 1 (BrokenRule)"),
        ({"rules": [FireAt(0)], "actions": [CallBack(explode)]}, "action 1 (CallBack)"),
        ({"behaviour": explode}, "behaviour 'behaviour'"),
        ({"on_reading": explode}, "on_reading"),
    ],
)
def test_a_broken_part_is_off_and_the_rest_goes_on(
    settings: dict[str, Any], part: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = KeepEvents()
    given = {**settings, "sinks": [*settings.get("sinks", []), kept]}
    watching = watched(**given)
    assert [(f.step, f.part) for f in watching.faults] == [(0, part)]
    assert kept.of(Fault) == watching.faults
    assert [r.step for r in kept.of(Reading)] == [0, 1, 2, 3] and len(kept.of(End)) == 1
    assert caplog.text.count("training goes on") == 1 and "\nsecond line" not in watching.faults[0].message
    with pytest.raises((OSError, ValueError, RuntimeError)):
        watched(**given, on_error="raise")


def test_a_fault_does_not_change_training() -> None:
    def run(watch: bool) -> dict[str, torch.Tensor]:
        model, watching = make_model(), directions(every=1, behaviour=explode, on_reading=explode, sinks=[Broken()])
        if not watch:
            return loop(model)
        with watching.watch(model, make_tokenizer()) as live:
            return loop(model, live=live)

    assert same_state(run(True), run(False))


def test_a_second_run_starts_with_everything_on() -> None:
    model, watching = make_model(), directions(every=1, behaviour=explode)
    for _ in range(2):
        with watching.watch(model, make_tokenizer()) as live:
            loop(model, 1, live)
        assert len(watching.faults) == 1


def test_bad_input_raises_at_the_start_in_any_case() -> None:
    with pytest.raises(InputError, match="on_error 'of'"):
        directions(on_error="of")
    rule = OutsideBand(feature="mean diference")
    with pytest.raises(InputError, match="mean difference"):
        directions(rules=[rule]).start(make_model(), make_tokenizer())
    copied = torch.nn.DataParallel(make_model())
    with pytest.raises(InputError, match="DataParallel"):
        directions(mode="both").start(copied, make_tokenizer())
    directions(mode="probe").start(copied, make_tokenizer())
    with pytest.raises(InputError, match="band_sd"):
        directions(band_sd=0.0)
    with pytest.raises(InputError, match="fit_every"):
        directions(fit_every=0)
    with pytest.raises(InputError, match="belongs inside"):
        directions().step(1)


def test_alarms_are_kept_told_and_acted_on_in_order() -> None:
    kept, seen = KeepEvents(), list[ActionContext]()
    act = CallBack(lambda alarm, context: seen.append(context))
    watching = watched(rules=[FireAt(1, 3, title="a"), FireAt(3, title="b")], actions=[act], sinks=[kept])
    assert (
        [(a.step, a.rule) for a in watching.alarms]
        == [(1, "a"), (3, "a"), (3, "b")]
        == [(a.step, a.rule) for a in kept.of(Alarm)]
    )
    assert [c.step for c in seen] == [1, 3, 3] and seen[0].monitor is watching
    kinds = [type(e).__name__ for e in kept.events]
    assert kinds == ["Start", "Reading", "Reading", "Alarm", "Reading", "Reading", "Alarm", "Alarm", "End"]


def test_rules_are_told_of_every_start() -> None:
    rule = FireAt()
    watching = directions(every=1, rules=[rule])
    for _ in range(2):
        with watching.watch(make_model(), make_tokenizer()):
            pass
    assert [type(s) for s in rule.starts] == [Start, Start] and rule.starts[0].bands.keys() == {"mean difference"}


class Cleaning(Action):
    """Notes the clean steps."""

    def __init__(self) -> None:
        object.__setattr__(self, "clean_at", [])

    def _do(self, alarm: Alarm, context: ActionContext) -> None:
        pass

    def clean(self, context: ActionContext) -> None:
        self.clean_at.append(context.step)  # pyright: ignore


def test_actions_hear_of_clean_readings_only() -> None:
    action = Cleaning()
    watched(rules=[FireAt(1, 2)], actions=[action])
    assert action.clean_at == [0, 3]  # pyright: ignore


def test_a_plain_loop_is_asked_to_stop() -> None:
    model, watching = make_model(), directions(every=1, rules=[FireAt(2)], actions=[StopTraining()])
    with watching.watch(model, make_tokenizer()) as live:
        loop(model, 5, live)
    assert watching.should_stop and watching.readings["step"].tolist() == [0, 1, 2]


def test_a_trainer_stops_and_gives_actions_its_pieces(tmp_path: Any) -> None:
    seen: list[ActionContext] = []
    act = CallBack(lambda alarm, context: seen.append(context))
    watching = directions(every=1, rules=[FireAt(2)], actions=[act, StopTraining()])
    trainer = sft(tmp_path, watching, max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 2 and watching.readings["step"].tolist() == [0, 1, 2]
    (context,) = seen
    assert context.control is trainer.control and context.state is trainer.state and context.args is trainer.args
    assert context.optimizer is trainer.optimizer and context.scheduler is trainer.lr_scheduler
    assert context.checkpoint_folder == tmp_path and context.model is trainer.model


def test_behaviour_is_drawn_beside_the_readings() -> None:
    kept, modes = KeepEvents(), list[bool]()

    def contrast(model: nn.Module) -> Behaviour:
        modes.append(model.training)
        return Behaviour(-1, "contrast index", 0.5, 0.4, 0.6)

    measurement = BehaviourMeasurement({"a": contrast, "length": lambda model: 3}, every=2)
    watched(steps=4, behaviour=measurement, sinks=[kept])
    found = [(b.step, b.name, b.value) for b in kept.of(Behaviour)]
    assert found == [(s, n, v) for s in (0, 2, 4) for n, v in (("contrast index", 0.5), ("length", 3.0))]
    assert modes == [False] * 3 and kept.of(Behaviour)[0].ci_low == 0.4


def test_loss_and_rate_of_a_plain_loop_are_kept() -> None:
    model, watching = make_model(), directions(every=2)
    with watching.watch(model, make_tokenizer()) as live:
        live.step(1, loss=2.5, lr=0.1)
        live.step(2, loss=torch.tensor(1.5, requires_grad=True))
    rows = watching.readings
    assert rows["loss"].isna().tolist() == [True, False]
    assert (rows["loss"].iloc[1], rows["learning_rate"].iloc[1]) == (1.5, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    with watching.watch(model, make_tokenizer(), optimizer=optimizer):
        pass
    assert watching.readings["learning_rate"].tolist() == [0.25]


def test_steps_may_come_in_strides() -> None:
    model, watching = make_model().train(), directions(mode="both", every=10)
    with watching.watch(model, make_tokenizer()) as live:
        for step in range(5, 25, 5):
            model(input_ids=torch.arange(2, 10)[None])
            live.step(step)
    assert watching.readings.query("mode == 'passive'")["step"].tolist() == [10, 20]
    assert watching.readings.query("mode == 'probe'")["step"].tolist() == [0, 10, 20]


def test_the_old_names_of_arguments_still_work_and_name_the_new_ones() -> None:
    with pytest.warns(DeprecationWarning, match=r"behaviour_every= is now behaviour=BehaviourMeasurement") as warned:
        old = directions(
            mode="both",
            passive_positions="all",
            max_passive_tokens=3,
            behaviour=lambda model: 1.0,
            behaviour_every=2,
        )
    names = [str(warning.message) for warning in warned]
    assert sum("is now passive=PassiveReading(" in name for name in names) == 2
    assert old.settings.passive == PassiveReading("all", max_tokens=3)
    assert old.settings.behaviour is not None and old.settings.behaviour.every == 2
    assert list(old.settings.behaviour.by_name) == ["behaviour"]
    with pytest.raises(InputError, match="every of BehaviourMeasurement must be at least 1"):
        BehaviourMeasurement(lambda model: 1.0, every=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
        directions(evry=2)
