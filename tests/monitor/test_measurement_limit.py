"""A rule on a measurement rings beyond its limit and not below, and what it starts is what every alarm starts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import persona_probe as pp
from persona_probe.errors import InputError
from persona_probe.monitor.actions.action import CallBack, StopTraining
from persona_probe.monitor.actions.rollback import RollBack
from persona_probe.monitor.calibration import HeldRule, calibrate, measured_series
from persona_probe.monitor.events import Alarm, Behaviour, End, Fault, Reading, Start, to_line
from persona_probe.monitor.monitor import FeatureMonitor
from persona_probe.monitor.monitored_run import MonitoredRun
from persona_probe.monitor.rules.bands import OutsideBand
from persona_probe.monitor.rules.measurement import MeasurementLimit
from persona_probe.monitor.rules.rule import AllOf, Not, Rule
from persona_probe.monitor.settings import BehaviourMeasurement
from persona_probe.monitor.sinks.files import read_events
from persona_probe.monitor.sinks.terminal import TerminalSink
from tests.factories import D_MODEL, LAYER, make_tokenizer, same_state
from tests.monitor.alarm_readings import NAN, feature, reading, start
from tests.monitor.events import write
from tests.monitor.monitored_runs import KeepEvents, adapted, directions, loop

HARM = "weights along harm"
SERIES = [0.0, 0.2, 0.4, 0.4, 0.6, 0.2, 0.5, 0.1, 0.9, 0.9]


def fired(rule: Rule, values: Sequence[float], name: str = HARM) -> list[int]:
    """Steps at which the rule fires on a series of measurements, each next to a reading of nothing."""
    alarms = [rule.take(step, [reading(step, 0.0)], {name: Behaviour(step, name, v)}) for step, v in enumerate(values)]
    return [alarm.step for of_step in alarms for alarm in of_step]


class Measured:
    """A measurement with the given values, one for each call."""

    def __init__(self, *values: float, name: str | None = None) -> None:
        self.values, self.name, self.calls = values, name, 0

    def __call__(self, model: torch.nn.Module) -> Behaviour | float:
        value = self.values[self.calls]
        self.calls += 1
        return value if self.name is None else Behaviour(0, self.name, value)


def watched(*values: float, steps: int = 4, **settings: Any) -> tuple[FeatureMonitor, dict[str, torch.Tensor]]:
    """A plain loop of the tiny adapter, read at every step; the monitor, and the weights that it ends with."""
    model = adapted()
    watching = directions(every=1, **{"behaviour": {HARM: Measured(*values)}, **settings})
    with watching.watch(model, make_tokenizer()) as live:
        return watching, loop(model, steps, live)


# --- The rule by itself


def test_it_fires_after_k_values_beyond_the_limit_and_is_armed_again_inside() -> None:
    assert fired(MeasurementLimit(HARM, above=0.3), SERIES) == [3, 9]
    assert fired(MeasurementLimit(HARM, above=0.3, k=1), SERIES) == [2, 6, 8]
    assert fired(MeasurementLimit(HARM, above=0.9, k=1), SERIES) == []
    assert fired(MeasurementLimit(HARM, below=0.15, k=1), SERIES) == [0, 7]
    assert fired(MeasurementLimit(HARM, above=0.8, below=0.15, k=1), SERIES) == [0, 7]
    assert fired(MeasurementLimit(HARM, above=0.3, k=1), SERIES, name="another") == []


def test_it_rings_where_the_rule_that_is_calibrated_says_so() -> None:
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)).double().numpy() - 0.5
    for k in (1, 2, 3):
        for side in ("above", "below", "both"):
            above, below = (0.2 if side != "below" else None), (-0.2 if side != "above" else None)
            wanted = HeldRule(k, side).alarms(values, 0.2).tolist()
            assert fired(MeasurementLimit(HARM, above, below, k), values.tolist()) == wanted != []


def test_a_value_that_is_not_finite_is_outside() -> None:
    rule = MeasurementLimit(HARM, above=0.3, k=1)
    (alarm,) = rule.take(0, [], {HARM: Behaviour(0, HARM, NAN)})
    assert "is not finite" in alarm.message and rule.firing and not rule.inside
    assert rule.take(1, [], {HARM: Behaviour(1, HARM, 0.1)}) == [] and rule.inside and not rule.firing


def test_a_step_without_the_measurement_is_not_known_to_be_clean() -> None:
    rule = MeasurementLimit(HARM, above=0.3)
    assert rule.inside and fired(rule, [0.1]) == [] and rule.inside
    assert rule.take(1, [reading(1, 0.0)], {}) == [] and not rule.inside and not rule.firing
    rule.take(2, [reading(2, 0.0)], {HARM: Behaviour(2, HARM, 0.1)})
    assert rule.inside
    rule.update(reading(3, 0.0))  # a reading by hand
    assert not rule.inside
    rule.begin(start())
    assert rule.inside


def test_a_value_of_an_earlier_step_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    rule = MeasurementLimit(HARM, above=0.3, k=1)
    assert fired(rule, [0.1, 0.1]) == []
    for _ in range(2):
        assert rule.take(1, [], {HARM: Behaviour(1, HARM, 0.9)}) == []
    assert caplog.text.count("came after step 1: ignored") == 1


def test_a_rule_of_rules_looks_once_all_of_a_step_is_known() -> None:
    def step(rule: Rule, number: int, shift: float, value: float) -> int:
        values = {HARM: Behaviour(number, HARM, value)}
        return len(rule.take(number, [reading(number, feature(shift))], values))

    def parts() -> tuple[Rule, Rule]:
        return OutsideBand(1, band_sd=0.5), MeasurementLimit(HARM, above=0.3, k=1)

    series = [(0.0, 0.0), (2.0, 0.9), (0.0, 0.0), (2.0, 0.0), (0.0, 0.9), (2.0, 0.9)]
    both, manner = AllOf(*parts(), name="harm"), AllOf(parts()[0], Not(parts()[1]), name="manner")
    assert [step(both, n, *pair) for n, pair in enumerate(series)] == [0, 1, 0, 0, 0, 1]
    assert [step(manner, n, *pair) for n, pair in enumerate(series)] == [0, 0, 0, 1, 0, 0]
    assert both.measurements == manner.measurements == (HARM,)


@pytest.mark.parametrize("limits", [{}, {"above": NAN}, {"below": math.inf}, {"above": 0.1, "below": 0.2}])
def test_limits_that_cannot_be_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="the limits of 'x' must be finite numbers"):
        MeasurementLimit("x", **limits)
    with pytest.raises(InputError, match="k must be at least 1"):
        MeasurementLimit("x", above=0.1, k=0)


def test_a_measurement_that_the_monitor_does_not_make_is_refused_at_once() -> None:
    rule = MeasurementLimit("weights along ham", above=0.3)
    for rules in ([rule], [AllOf(OutsideBand(), Not(rule))]):
        with pytest.raises(InputError, match=r"unknown measurement in rule '.*' 'weights along ham': did you mean"):
            directions(rules=rules, behaviour={HARM: Measured()})
        with pytest.raises(
            InputError, match=r"but the monitor makes none: pass behaviour=\{'weights along ham': ...\}"
        ):
            directions(rules=rules)
    with pytest.raises(InputError, match="known: 'behaviour'"):
        directions(rules=[rule], behaviour=Measured())
    directions(rules=[MeasurementLimit("behaviour", above=0.3)], behaviour=Measured())


# --- In a monitor


def test_the_alarm_is_logged_written_read_back_and_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, kept = tmp_path / "readings.jsonl", KeepEvents()
    with (tmp_path / "terminal.txt").open("w") as file:
        sinks = [kept, TerminalSink(file)]
        rules = [MeasurementLimit(HARM, above=0.3), MeasurementLimit(HARM, above=0.9, name="higher")]
        watching, _ = watched(0.0, 0.2, 0.4, 0.5, 0.6, rules=rules, path=path, sinks=sinks)
    (alarm,) = watching.alarms
    message = f"'{HARM}' was beyond its limit at 2 readings in a row: 0.5, above 0.3"
    assert alarm == Alarm(3, "measurement limit", HARM, message, 0.5, 0.3)
    events = read_events(path)
    assert list(map(to_line, events)) == list(map(to_line, kept.events))
    assert [event for event in events if isinstance(event, Alarm)] == [alarm]
    of_step = [type(event) for event in events if not isinstance(event, Start | End) and event.step == 3]
    assert of_step == [Reading, Behaviour, Alarm]
    assert f"step 3, measurement limit: {message}" in caplog.text
    assert f"ALARM measurement limit: {message}" in (tmp_path / "terminal.txt").read_text()
    (marker,) = [trace for trace in watching.figure().data if trace.mode == "markers"]  # pyright: ignore
    assert (list(marker.x), list(marker.y), marker.xaxis) == ([3], [0.5], "x2")  # pyright: ignore
    assert len(watching.figure().layout.shapes) == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_measurement_that_names_its_events_is_asked_by_its_name_in_behaviour() -> None:
    rules = [MeasurementLimit("behaviour", above=0.3, k=1)]
    watching, _ = watched(rules=rules, behaviour=Measured(0.0, 0.4, 0.0, 0.0, 0.0, name="bad advice"))
    assert [(alarm.step, alarm.feature) for alarm in watching.alarms] == [(1, "bad advice")]


def test_training_stops_where_an_action_says_so() -> None:
    seen: list[int] = []
    actions = [CallBack(lambda alarm, context: seen.append(context.step)), StopTraining(only_for=["harm"])]
    rule = MeasurementLimit(HARM, above=0.3, name="harm")
    watching, _ = watched(0.0, 0.4, 0.4, rules=[rule], actions=actions)
    assert watching.should_stop and seen == [2] and watching.last_step == 2


@pytest.mark.parametrize(("every", "values", "back_to"), [(None, [0.0, 0.0, 0.0, 0.4], 2), (3, [0.0, 0.4], 0)])
def test_a_rollback_goes_to_the_last_weights_that_were_measured_inside(
    every: int | None, values: list[float], back_to: int
) -> None:
    settings: dict[str, Any] = {"behaviour": BehaviourMeasurement({HARM: Measured(*values)}, every)}
    rule = MeasurementLimit(HARM, above=0.3, k=1)
    watching, left = watched(rules=[rule], actions=[RollBack(then="stop")], **settings)
    assert [alarm.step for alarm in watching.alarms] == [3] and watching.should_stop
    assert same_state(left, loop(adapted(), back_to)) and not same_state(left, loop(adapted(), 3))


def test_it_rings_where_the_probes_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MonitoredRun, "_read_probes", Measured())  # the first call raises
    watching, _ = watched(0.0, 0.4, 0.4, 0.0, 0.0, rules=[MeasurementLimit(HARM, above=0.3)])
    assert [fault.part for fault in watching.faults] == ["probe reading"]
    assert [alarm.step for alarm in watching.alarms] == [2]


def test_a_measurement_that_fails_is_never_clean_again() -> None:
    kept, cleans = KeepEvents(), list[int]()

    class Cleans(StopTraining):
        def clean(self, context: Any) -> None:
            cleans.append(context.step)

    watching, _ = watched(0.0, 0.1, rules=[MeasurementLimit(HARM, above=0.3)], sinks=[kept], actions=[Cleans()])
    assert [fault.step for fault in kept.of(Fault)] == [2] and cleans == [0, 1] and not watching.alarms


def test_weights_that_write_along_a_direction_ring() -> None:
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(9))
    model = adapted()
    settings: dict[str, Any] = {"behaviour": {HARM: pp.WeightsAlong(vector, LAYER)}}
    watching = directions(every=1, rules=[MeasurementLimit(HARM, above=0.99, k=1)], **settings)
    with watching.watch(model, make_tokenizer()) as live:
        live.step(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name and "layers.0.mlp.down_proj" in name:
                    parameter[:, 0] = vector
        live.step(2)
    assert not watching.faults
    assert [(alarm.step, alarm.feature) for alarm in watching.alarms] == [(2, HARM)]
    assert watching.alarms[0].value == pytest.approx(1, abs=1e-6)


# --- Calibrated on benign runs


def benign_files(folder: Path, *tops: float) -> list[Path]:
    """Event files of runs whose highest value that was held for two readings is the given one."""
    for number, top in enumerate(tops):
        values = (0.0, top, top, 2 * top, 0.0)
        events = [Behaviour(step, HARM, value) for step, value in enumerate(values)]
        write(folder / f"{number:02d}.jsonl", start(), *events, End(4, 5, 0.1))
    return sorted(folder.glob("*.jsonl"))


def test_the_limit_comes_from_benign_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = benign_files(tmp_path, *[n / 100 for n in range(1, 40)])
    rule = MeasurementLimit.calibrated(HARM, files)
    wanted = calibrate(measured_series(files, HARM), HeldRule(2), 0.05)
    assert wanted.supported and rule.above == wanted.threshold == 0.38 and rule.below is None and not caplog.records
    assert "1 of 39 benign runs alarm" in rule.calibrated_on and rule.describe().endswith(wanted.statement)
    assert fired(rule, [0.38] * 4) == []
    rule.reset()
    assert fired(rule, [0.39] * 4) == [1]
    alone = MeasurementLimit.calibrated(HARM, files, k=1, rate=0.5)
    assert alone.above == pytest.approx(2 * 0.2)


def test_a_limit_below_and_one_on_both_sides() -> None:
    series = {str(n): torch.tensor([0.0, -n, -n, 0.0]).double().numpy() for n in range(1, 20)}
    below = MeasurementLimit.calibrated(HARM, series, side="below")
    both = MeasurementLimit.calibrated(HARM, series, side="both")
    assert (below.above, below.below) == (None, -19) and (both.above, both.below) == (19, -19)
    for name, values in series.items():
        assert fired(below, values.tolist()) == [], name
        below.reset()


def test_too_few_benign_runs_say_what_they_cannot_promise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rule = MeasurementLimit.calibrated(HARM, benign_files(tmp_path, 0.1, 0.2, 0.3))
    assert rule.above == 0.3 and "3 benign runs cannot promise 0.05" in rule.calibrated_on
    assert f"{HARM}: 3 benign runs cannot promise" in caplog.text
    with pytest.raises(InputError, match="1 benign runs: a threshold needs at least two"):
        MeasurementLimit.calibrated(HARM, benign_files(tmp_path / "one", 0.1))
    with pytest.raises(InputError, match="fewer than 9 readings"):
        MeasurementLimit.calibrated(HARM, sorted(tmp_path.glob("*.jsonl")), k=9)


def test_files_without_the_measurement_and_files_given_twice_are_refused(tmp_path: Path) -> None:
    files = benign_files(tmp_path, 0.1, 0.2)
    with pytest.raises(InputError, match=rf"unknown measurement of .*00.jsonl 'harm': .*'{HARM}'"):
        MeasurementLimit.calibrated("harm", files)
    with pytest.raises(InputError, match="given twice"):
        MeasurementLimit.calibrated(HARM, [*files, files[0]])
    with pytest.raises(InputError, match="no events at"):
        MeasurementLimit.calibrated(HARM, [*files, tmp_path / "none.jsonl"])


def test_of_a_resumed_run_each_step_counts_once(tmp_path: Path) -> None:
    first = [Behaviour(step, HARM, 0.1 * step) for step in range(4)]
    again = [Behaviour(step, HARM, 0.5) for step in (2, 3, 4)]
    write(tmp_path / "run.jsonl", start(), *first, start(), *again)
    (values,) = measured_series([tmp_path / "run.jsonl"], HARM).values()
    assert values.tolist() == [0.0, 0.1, 0.5, 0.5, 0.5]


def test_runs_that_were_monitored_calibrate_the_rule_of_the_next(tmp_path: Path) -> None:
    for n in (1, 2):
        watched(0.0, 0.1 * n, 0.1 * n, steps=2, path=tmp_path / f"{n}.jsonl")
    rule = MeasurementLimit.calibrated(HARM, sorted(tmp_path.glob("*.jsonl")))
    rings, _ = watched(0.0, 0.21, 0.21, steps=2, rules=[rule])
    quiet, _ = watched(0.0, 0.2, 0.2, steps=2, rules=[rule])
    assert [alarm.step for alarm in rings.alarms] == [2] and quiet.alarms == []
