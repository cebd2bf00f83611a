"""Every fault in every part of a monitor, at random, under three trainers; `make assault` does it for longer."""

from pathlib import Path

import pytest

from benchmarks.assault.counts import Settings
from benchmarks.assault.monitor_faults import HOOKS, Cases, Plan, Scene, assault, raises, reads_again, untidy


def test_a_monitor_whose_parts_fail_changes_no_bit_and_says_what_is_so(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    counts = assault(Settings(tmp_path, seed=0, short=True))
    assert [list(count.failures) for count in counts] == [[]] * 3
    assert all(count.tried >= 6 for count in counts)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    return Cases(tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("hook", HOOKS)
def test_each_part_may_fail_at_every_call(hook: str, cases: Cases) -> None:
    for fault in (raises(OSError), untidy):
        plan = Plan({hook: (fault, None)})
        assert cases.hurt("loop", "both", plan) == ("", "") and plan.struck == {hook}


def test_the_comparison_sees_a_part_that_does_change_the_run(cases: Cases) -> None:
    def scale(scene: Scene) -> None:
        next(iter(scene.model.parameters())).data.mul_(1.5)

    did, said = cases.hurt("loop", "both", Plan({"on_reading": (scale, 2)}))
    assert did == "weights" and "mean is another" in said


@pytest.mark.parametrize("name", ["loop", "transformers", "lightning"])
def test_an_action_that_reads_another_model_does_not_make_the_last_step_be_read_twice(name: str, cases: Cases) -> None:
    plan = Plan({"action.clean": (reads_again, None)})
    assert cases.hurt(name, "both", plan) == ("", "") and plan.struck == {"action.clean"}
