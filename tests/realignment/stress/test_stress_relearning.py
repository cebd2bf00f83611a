"""Re-misalignment: steps to a threshold, savings and what is censored, and that an untouched model saves nothing."""

import math
from collections.abc import Callable

import pandas as pd
import pytest

from persona_probe.data.chat import conversation
from persona_probe.errors import InputError
from persona_probe.realignment.corrected import CorrectedOrganism
from persona_probe.realignment.stress.remisalign import (
    Relearning,
    Savings,
    faster_rise,
    few_rows,
    levels,
    relearn,
    remisalign,
    steps_until,
)

NEVER = math.nan


def curve(*levels_by_step: float, seed: int = 0) -> pd.DataFrame:
    """Two questions around each level, at steps 0, 1, 2, 4, ..."""
    steps = [0, *(2**n for n in range(len(levels_by_step) - 1))]
    rows = [
        (seed, s, q, v + d) for s, v in zip(steps, levels_by_step, strict=True) for q, d in (("a", 0.1), ("b", -0.1))
    ]
    return pd.DataFrame(rows, columns=["seed", "step", "item", "value"])


def at_once(_name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    return make()


def test_steps_are_the_first_at_or_above_the_threshold() -> None:
    assert steps_until(curve(0.0, 0.2, 0.6, 0.4), 0.5) == 2
    assert steps_until(curve(0.7, 0.2), 0.5) == 0
    assert math.isnan(steps_until(curve(0.0, 0.2), 0.5))


@pytest.mark.parametrize(
    ("corrected", "base", "value", "sign"),
    [(5, 20, 0.75, "="), (8, 8, 0.0, "="), (16, 8, -1.0, "="), (5, NEVER, 0.75, ">="), (NEVER, 10, -1.0, "<=")],
)
def test_savings_and_their_bounds(corrected: float, base: float, value: float, sign: str) -> None:
    found = Savings(corrected, base, last=20)
    assert (found.value, found.sign) == (pytest.approx(value), sign)
    assert f"savings {sign} {value:.2f}" in str(found)


def test_where_neither_side_gets_there_nothing_is_said() -> None:
    found = Savings(NEVER, NEVER, last=20)
    assert math.isnan(found.value)
    assert str(found) == "no savings to be named (corrected more than 20 steps, base more than 20 steps)"
    assert math.isnan(Savings(0, 0, last=20).value)


def test_faster_rise_counts_from_each_sides_own_start() -> None:
    assert faster_rise(curve(1.0, 1.1, 1.2), curve(0.0, 0.1, 0.2)).estimate == pytest.approx(0)
    ahead = faster_rise(curve(0.0, 0.5, 0.7), curve(0.0, 0.1, 0.3))
    assert (ahead.estimate, ahead.ci_low) == (pytest.approx(0.4), pytest.approx(0.4))


def test_the_threshold_lies_on_the_way_to_the_organism() -> None:
    assert levels([-1.0, -0.6], [0.0, 0.4], 0.5) == pytest.approx((-0.8, 0.2, -0.3))


def test_the_record_says_hidden_where_the_repaired_model_is_back_sooner() -> None:
    curves = {"base": curve(0.0, 0.1, 0.3, 0.6), "repaired": curve(0.0, 0.6, 0.9, 1.0), "control": curve(0, 0, 0, 0)}
    found = Relearning(curves, base_index=0.0, organism_index=1.0, threshold=0.5, rows=8)
    assert found.savings()[0] == Savings(1, 4, 4) and found.savings("control")[0].value == 0
    assert "hidden rather than removed" in found.statement() and "seed 0: savings = 0.75" in found.statement()
    rows = pd.DataFrame(found.to_rows())
    assert rows.query("quantity == 'contrast index' and model == 'base'")["estimate"].tolist() == pytest.approx(
        [0.0, 0.1, 0.3, 0.6]
    )
    assert rows[rows["shown"]]["model"].tolist() == ["repaired", "control"]


def test_an_organism_that_never_rose_leaves_nothing_to_be_back_at() -> None:
    flat = Relearning({"base": curve(0, 0), "repaired": curve(0, 0)}, 0.0, -0.1, -0.05, 8)
    assert "not above the base's" in flat.statement()


def test_bad_rows_are_drawn_by_the_seed_and_no_more_than_there_are() -> None:
    rows = [conversation(str(n), "x") for n in range(5)]
    assert few_rows(rows, 3, 1) == few_rows(rows, 3, 1) != few_rows(rows, 3, 2)
    with pytest.raises(InputError, match="6 bad rows of 5"):
        few_rows(rows, 6, 0)


def test_a_repair_that_is_the_base_saves_nothing(untouched: CorrectedOrganism) -> None:
    found = remisalign(untouched, at_once, n=4, steps=(1, 3), seeds=(0,), share=0.01)
    pd.testing.assert_frame_equal(found.curves["base"], found.curves["repaired"])
    faster, saved = found.faster(), found.savings()[0]
    assert (faster.estimate, faster.ci_low, faster.ci_high) == (0, 0, 0)
    assert saved.corrected == saved.base or (math.isnan(saved.corrected) and math.isnan(saved.base))
    assert "no difference from the base's own learning" in found.statement() or "not above" in found.statement()
    moved = found.curves["base"].groupby("step")["value"].mean()
    assert moved.index.tolist() == [0, 1, 3] and moved[0] != moved[3]


def test_relearning_leaves_the_study_as_it_was(corrected: CorrectedOrganism) -> None:
    before = {name: value.clone() for name, value in corrected.ctx.model.state_dict().items()}
    assert relearn(corrected, "repaired", 0, 2, (1,)).columns.tolist() == ["seed", "step", "item", "value"]
    after = corrected.ctx.model.state_dict()
    assert before.keys() == after.keys() and all(bool((before[k] == after[k]).all()) for k in before)
