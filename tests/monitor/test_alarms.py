"""Rules fire once an excursion, follow features and modes for themselves, and say what they ignore."""

import math
from dataclasses import replace

import pytest

from persona_probe.errors import InputError
from persona_probe.monitor.events import Reading
from persona_probe.monitor.rules.bands import OutsideBand
from persona_probe.monitor.rules.boundary import Boundary
from persona_probe.monitor.rules.change import Cusum, Ewma
from persona_probe.monitor.rules.explained_variance import ExplainedVarianceFloor
from persona_probe.monitor.rules.rule import AllOf, AnyOf, Rule, all_inside
from tests.monitor.alarm_readings import NAN, alarm_steps, feature, reading, start


def test_two_readings_outside_the_band_make_one_alarm() -> None:
    rule = OutsideBand(2, band_sd=0.5)
    assert alarm_steps(rule, [0, 0.6, 0.4, 0.6, 0.7, 0.8, 0.9]) == [4]
    assert rule.firing


def test_it_is_armed_again_once_it_was_back_inside() -> None:
    rule = OutsideBand(2, band_sd=0.5)
    assert alarm_steps(rule, [1, 1, 1, 0, 1, 0, 1, 1, -1, -1]) == [1, 7]


@pytest.mark.parametrize(("side", "steps"), [("both", [0, 2]), ("up", [0]), ("down", [2])])
def test_a_side_is_watched(side: str, steps: list[int]) -> None:
    assert alarm_steps(OutsideBand(1, band_sd=0.5, side=side), [1, 0, -1]) == steps


def test_an_alarm_has_the_numbers() -> None:
    rule = OutsideBand(1, band_sd=0.5)
    alarm = rule.update(reading(7, 0.75))
    assert alarm is not None
    assert (alarm.step, alarm.rule, alarm.feature) == (7, "outside band", "persona")
    assert (alarm.value, alarm.threshold) == pytest.approx((2.5, 2.0))
    assert alarm.message == "'persona' was outside its band at one reading: 2.5, above 2 (shift +0.75 base sd)"
    below = OutsideBand(1, band_sd=0.5).update(reading(0, -0.75))
    assert below is not None and (below.value, below.threshold) == pytest.approx((-0.5, 0.0))


def test_bands_come_from_the_rule_the_width_the_start_or_the_default() -> None:
    value = feature(0)
    assert OutsideBand().band(value, 8) == (0.0, 2.0)
    started = OutsideBand()
    started.begin(start(persona=(0.8, 1.2)))
    assert started.band(value, 8) == (0.8, 1.2)
    wide = OutsideBand(band_sd=2)
    wide.begin(start(persona=(0.8, 1.2)))
    assert wide.band(value, 8) == (-3.0, 5.0)
    given = OutsideBand(bands={"persona": (0.9, 1.1)}, band_sd=2)
    given.begin(start(persona=(0.8, 1.2)))
    assert given.band(value, 8) == (0.9, 1.1)


def test_a_latent_that_is_silent_on_the_base_is_outside_once_it_fires() -> None:
    silent, active = feature(0, base_mean=0.0, base_sd=0.0), 0.01
    moved = [silent, silent.__class__(**{**vars(silent), "mean": active})]
    rule = OutsideBand(1)
    assert rule.update(reading(0, moved[0])) is None
    alarm = rule.update(reading(1, moved[1]))
    assert alarm is not None and alarm.value == active and alarm.threshold == 0
    assert "shift" not in alarm.message


def test_one_probe_has_no_band_and_rounding_is_no_excursion(caplog: pytest.LogCaptureFixture) -> None:
    still = feature(0, base_mean=3.0, base_sd=0.0)
    rounded = still.__class__(**{**vars(still), "mean": 3.0 * (1 + 1e-9)})
    assert OutsideBand(1).update(reading(0, rounded)) is None
    assert OutsideBand(1).update(reading(0, feature(5), n_probes=1)) is None
    assert "it has no band" in caplog.text


def test_a_fresh_start_and_reset_forget() -> None:
    rule = OutsideBand(2, band_sd=0.5)
    rule.update(reading(0, 1))
    rule.reset()
    assert rule.inside and rule.update(reading(0, 1)) is None
    assert rule.update(reading(1, 1)) is not None
    rule.begin(start())
    assert not rule.firing and rule.inside
    assert alarm_steps(rule, [1, 1]) == [1]


def test_features_have_their_own_excursions() -> None:
    rule = OutsideBand(1, band_sd=0.5)
    fired = [
        rule.update(reading(step, feature(a, "a"), feature(b, "b")))
        for step, (a, b) in enumerate([(0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (1, 1)])
    ]
    assert [alarm.feature if alarm else None for alarm in fired] == [None, "a", "b", None, None, "a"]
    assert fired[5] is not None and "'a'" in fired[5].message and "'b'" in fired[5].message
    only = OutsideBand(1, band_sd=0.5, feature="b")
    assert only.update(reading(0, feature(1, "a"), feature(0, "b"))) is None
    assert only.update(reading(1, feature(0, "a"), feature(1, "b"))) is not None


def test_modes_are_two_series() -> None:
    series = [reading(1, 1, mode="probe"), reading(1, 1, mode="passive"), reading(2, 1, mode="passive")]
    assert [OutsideBand(2, band_sd=0.5, mode="probe").update(r) for r in series] == [None] * 3
    rule = OutsideBand(2, band_sd=0.5)
    assert [rule.update(r) is not None for r in series] == [False, False, True]


def test_readings_out_of_order_are_ignored_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rule = OutsideBand(2, band_sd=0.5)
    fired = [rule.update(reading(step, 1)) for step in (5, 5, 4, 3)]
    assert fired == [None] * 4
    assert len(caplog.records) == 1 and "at step 5 came after one at step 5" in caplog.text
    assert rule.update(reading(6, 1)) is not None


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("rule", "step"),
    [
        (OutsideBand(2, band_sd=0.5, side="up"), 2),
        (OutsideBand(1, bands={"persona": (-9.0, 9.0)}, side="down"), 1),
        (Cusum(0.5, 50.0), 1),
        (Ewma(0.5, 50.0), 1),
        (Boundary(("shift", "loss"), (1.0, 1.0), -99.0), 1),
        (AllOf(OutsideBand(1, band_sd=9.0), Cusum(0.5, 50.0)), 1),
        (AnyOf(OutsideBand(3, band_sd=9.0), Cusum(0.5, 50.0)), 1),
        (ExplainedVarianceFloor(floor=0.1), 1),
    ],
)
def test_what_is_not_finite_is_outside_for_every_rule(rule: Rule, step: int, bad: float) -> None:
    def at(n: int, shift: float) -> Reading:
        good = math.isfinite(shift)
        return replace(reading(n, shift, ev=0.9 if good else NAN), loss=1.0, finite=good)

    rule.reset()
    assert rule.update(at(0, 0.0)) is None and rule.inside
    fired = [rule.update(at(n, bad)) for n in range(1, 4)]
    assert [n for n, alarm in enumerate(fired, 1) if alarm] == [step] and rule.firing and not rule.inside
    alarm = fired[step - 1]
    assert alarm is not None and "not finite" in alarm.message and alarm.feature
    rule.update(at(4, 0.0))
    assert rule.inside and not rule.firing


def test_a_number_that_is_missing_is_ignored_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rule = Boundary(("loss",), (1.0,), -1.0)
    assert [rule.update(reading(n, 0.0)) for n in range(3)] == [None] * 3 and rule.inside
    assert len(caplog.records) == 1 and "one of its columns (loss) is NaN" in caplog.text


@pytest.mark.parametrize("rule", [Cusum(), Ewma()])
def test_a_base_that_does_not_vary_gives_no_shift(rule: Rule, caplog: pytest.LogCaptureFixture) -> None:
    assert rule.update(reading(0, feature(0, base_sd=0.0))) is None
    assert "no shift in base sd; use OutsideBand" in caplog.text


def test_inside_is_stricter_than_not_firing() -> None:
    band, sums = OutsideBand(2, band_sd=0.5), Cusum(0.5, 5)
    assert all_inside([band, sums])
    for rule in (band, sums):
        rule.update(reading(0, 0.7))
        assert not rule.inside and not rule.firing
    assert not all_inside([band, OutsideBand()])
    for rule in (band, sums):
        rule.update(reading(1, 0.1))
    assert all_inside([band, sums])


def test_explained_variance_under_a_floor() -> None:
    values = [0.6, 0.49, 0.4, 0.5, 0.3]
    rule, patient = ExplainedVarianceFloor(), ExplainedVarianceFloor(k=2)
    fired = [rule.update(reading(i, 0, ev=ev)) for i, ev in enumerate(values)]
    assert [alarm.step for alarm in fired if alarm] == [1, 4]
    assert fired[1] is not None and fired[1].message == (
        "'explained variance' is 0.490, under 0.500: the SAE no longer fits, do not trust the feature curves"
    )
    assert [i for i, ev in enumerate(values) if patient.update(reading(i, 0, ev=ev))] == [2]


def test_explained_variance_may_drop_by_a_share_of_the_base() -> None:
    def steps(rule: Rule, *values: float) -> list[int]:
        return [i for i, ev in enumerate(values) if rule.update(reading(i, 0, ev=ev))]

    assert steps(ExplainedVarianceFloor(drop=0.25), 0.8, 0.61, 0.59) == [2]
    assert steps(ExplainedVarianceFloor(drop=0.25), NAN, 0.4, 0.31, 0.29) == [3]
    assert steps(ExplainedVarianceFloor(0.7, drop=0.25), 0.8, 0.69) == [1]
    given = ExplainedVarianceFloor(drop=0.25)
    given.begin(start().__class__({"persona": 3}, 1, 8, {}, {"base_explained_variance": 1.0}))
    assert steps(given, 0.8, 0.76, 0.74) == [2]


def test_a_missing_fit_is_ignored_and_said(caplog: pytest.LogCaptureFixture) -> None:
    rule = ExplainedVarianceFloor()
    assert rule.update(reading(0, 0, ev=NAN)) is None and rule.update(reading(1, 0, ev=NAN)) is None
    assert len(caplog.records) == 1 and "explained variance is ignored where it is NaN" in caplog.text


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (OutsideBand(), "outside band: any feature outside the base band at 2 readings in a row"),
        (
            OutsideBand(1, band_sd=2, feature="persona", side="up", name="rise"),
            "rise: 'persona' outside base +- 2 sd at one reading, upward",
        ),
        (Cusum(mode="probe"), "cusum: cumulative sum of any feature, probe readings, drift 0.5, threshold 5 base sd"),
        (Ewma(), "ewma: moving average of any feature, lam 0.2, width 3, sd 1"),
        (
            ExplainedVarianceFloor(drop=0.2),
            "explained variance floor: explained variance under 80% of the base's at one reading",
        ),
    ],
)
def test_rules_describe_themselves_in_one_line(rule: Rule, line: str) -> None:
    assert rule.describe() == line


def test_bad_settings_say_what_to_change() -> None:
    for make, match in [
        (lambda: OutsideBand(0), "k must be at least 1 reading"),
        (lambda: OutsideBand(band_sd=-1), "band_sd must be above zero"),
        (lambda: OutsideBand(bands={"a": (2.0, 1.0)}), r"band of 'a' must be \(low, high\)"),
        (lambda: OutsideBand(mode="probes"), "did you mean 'probe'"),
        (lambda: OutsideBand(side="upp"), "did you mean 'up'"),
        (lambda: Cusum(-0.1), "drift must be zero or more"),
        (lambda: Cusum(threshold=math.inf), "threshold must be above zero"),
        (lambda: Ewma(0), "lam must be above 0"),
        (lambda: Ewma(width=NAN), "width must be above zero"),
        (lambda: ExplainedVarianceFloor(1.5), "floor must be below 1"),
        (lambda: ExplainedVarianceFloor(drop=1.0), "drop must be a share"),
    ]:
        with pytest.raises(InputError, match=match):
            make()


def test_an_unknown_feature_is_refused_at_the_start() -> None:
    with pytest.raises(InputError, match="did you mean 'persona'"):
        Cusum(feature="personna").begin(start())
    with pytest.raises(InputError, match="did you mean 'persona'"):
        OutsideBand(bands={"personna": (0.0, 1.0)}).begin(start())
    with pytest.raises(InputError, match="unknown feature 'other'"):
        OutsideBand(feature="other").update(reading(0, 0))
