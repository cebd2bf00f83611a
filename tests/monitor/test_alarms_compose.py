"""Rules of rules: truth tables over excursions, not over single alarms."""

import pytest

from persona_probe.errors import InputError
from persona_probe.monitor.rules.bands import OutsideBand
from persona_probe.monitor.rules.explained_variance import ExplainedVarianceFloor
from persona_probe.monitor.rules.rule import AllOf, AnyOf, Not, Rule
from tests.monitor.alarm_readings import NAN, feature, reading, start

SERIES = [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (1, 1), (1, 1)]


def parts() -> tuple[Rule, Rule]:
    return OutsideBand(1, band_sd=0.5, feature="a"), OutsideBand(1, band_sd=0.5, feature="b")


def alarms(rule: Rule) -> tuple[list[int], list[bool]]:
    """Steps of alarms, and the state after each reading."""
    fired, states = [], []
    for step, (a, b) in enumerate(SERIES):
        alarm = rule.update(reading(step, feature(a, "a"), feature(b, "b")))
        fired += [step] if alarm else []
        states.append(rule.firing)
    return fired, states


@pytest.mark.parametrize(
    ("make", "fired", "table"),
    [
        (lambda a, b: AllOf(a, b), [2, 5], [False, False, True, False, False, True, True]),
        (lambda a, b: AnyOf(a, b), [1, 5], [False, True, True, True, False, True, True]),
        (lambda a, b: AllOf(a, Not(b)), [1], [False, True, False, False, False, False, False]),
        (lambda a, b: Not(AnyOf(a, b)), [0, 4], [True, False, False, False, True, False, False]),
        (lambda a, b: AnyOf(AllOf(a, b), Not(a)), [0, 2], [True, False, True, True, True, True, True]),
    ],
)
def test_the_truth_table(make, fired: list[int], table: list[bool]) -> None:
    rule = make(*parts())
    assert alarms(rule) == (fired, table)
    rule.reset()
    assert alarms(rule) == (fired, table)
    rule.begin(start("a", "b"))
    assert alarms(rule) == (fired, table)


def test_parts_need_not_fire_at_one_reading() -> None:
    rule = AllOf(*parts())
    rule.update(reading(0, feature(1, "a"), feature(0, "b")))
    alarm = rule.update(reading(4, feature(1, "a"), feature(2, "b")))
    assert alarm is not None
    assert (alarm.step, alarm.rule, alarm.feature) == (4, "all of", "a, b")
    assert (alarm.value, alarm.threshold) == pytest.approx((5.0, 2.0))
    assert "outside band (step 0): 'a' was" in alarm.message and " and outside band (step 4): 'b' was" in alarm.message
    assert "\n" not in alarm.message


def test_a_drift_counts_only_while_the_sae_fits() -> None:
    rule = AllOf(OutsideBand(1, band_sd=0.5), Not(ExplainedVarianceFloor()), name="drift that can be trusted")
    assert rule.update(reading(0, 0)) is None
    assert rule.update(reading(1, 2, ev=0.3)) is None and rule.inside
    alarm = rule.update(reading(2, 2, ev=0.8))
    assert alarm is not None and alarm.rule == "drift that can be trusted" and alarm.value == pytest.approx(5.0)
    assert "no excursion of explained variance floor" in alarm.message
    assert AllOf(OutsideBand(1), Not(ExplainedVarianceFloor())).update(reading(0, 9, ev=NAN)) is not None


def test_inside_follows_the_parts() -> None:
    pending = [OutsideBand(2, band_sd=0.5, feature="a"), OutsideBand(2, band_sd=0.5, feature="b")]
    every, some = AllOf(*pending), AnyOf(*pending)
    assert every.inside and some.inside
    every.update(reading(0, feature(1, "a"), feature(0, "b")))
    assert every.inside and not some.inside and not some.firing
    every.update(reading(1, feature(1, "a"), feature(1, "b")))
    assert not every.inside and not every.firing and some.firing


def test_a_composition_describes_and_checks_its_parts() -> None:
    rule = AnyOf(OutsideBand(), ExplainedVarianceFloor(), name="either")
    assert rule.describe() == (
        "either (outside band: any feature outside the base band at 2 readings in a row; "
        "explained variance floor: explained variance under 0.5 at one reading)"
    )
    with pytest.raises(InputError, match="AllOf needs at least one rule"):
        AllOf()
    with pytest.raises(InputError, match="unknown feature 'a'"):
        AnyOf(*parts()).begin(start("persona"))
