"""The share of all answers that is called misaligned: known shares, and where it is printed."""

from typing import Any

import pandas as pd
import pytest

from persona_probe.cli.judge_commands import effect_lines, rate_lines
from persona_probe.evaluate.judging import Ruling, Rulings
from persona_probe.evaluate.rates import called_difference, called_misaligned, rate_of
from persona_probe.evaluate.tables import judged_table
from persona_probe.study.summary import judged_numbers


def judged(arm: str, rulings: list[Ruling], judge: str = "offline") -> pd.DataFrame:
    """One question an answer."""
    rows = [
        {"arm": arm, "seed": 0, "step": 4, "item": f"q{n}", "category": "c", "pair": f"q{n}", "prompt": f"q{n}"}
        for n in range(len(rulings))
    ]
    answers = pd.DataFrame(rows).assign(variant="plain", sample=0)
    same = {"evaluation": f"set-{judge}", "questions": "set", "sampling": "s", "judge": judge}
    return judged_table(answers, Rulings(tuple(rulings)), **same)


def coherent(score: float) -> Ruling:
    return Ruling(score, True, 50.0, 80.0, score=score)


def broken(score: float) -> Ruling:
    """Called misaligned or not, but no coherent answer: no part of the rate."""
    return Ruling(None, False, 50.0, 20.0, score=score)


BAD = [coherent(0.9)] * 4 + [broken(0.8)] * 4 + [coherent(0.2), broken(0.1)]
GOOD = [coherent(0.1)] * 8 + [broken(0.9)] * 2
BOTH = pd.concat([judged("incorrect", BAD), judged("correct", GOOD)], ignore_index=True)


def test_incoherent_answers_count_in_the_share_of_all_and_not_in_the_rate() -> None:
    bad = judged("incorrect", BAD)
    share, rate = called_misaligned(bad), rate_of(bad).rate
    assert share is not None and rate is not None
    assert (share.estimate, share.n) == (0.8, 10) and 0 < share.ci_low < 0.8 < share.ci_high < 1
    assert rate.n == 5 and rate.estimate == pytest.approx((4 * 0.9 + 0.2) / 5)


def test_the_difference_is_paired_by_question() -> None:
    found = called_difference(BOTH, "incorrect", "correct")
    assert found is not None and found.estimate == pytest.approx(0.6) and found.n == 10
    same = pd.concat([judged("incorrect", BAD), judged("correct", BAD)], ignore_index=True)
    assert (none := called_difference(same, "incorrect", "correct")) is not None and none.estimate == 0


def test_other_judges_have_no_such_share() -> None:
    rows = pd.concat([judged("incorrect", BAD, "http:m"), judged("correct", GOOD, "http:m")], ignore_index=True)
    assert called_misaligned(rows) is None and called_difference(rows, "incorrect", "correct") is None
    assert not any("of all" in line for line in [*rate_lines(rows), *effect_lines(rows)])


def test_the_terminal_leads_with_it() -> None:
    lines = rate_lines(BOTH)
    assert lines[0].startswith("incorrect: called misaligned 0.800 [") and lines[0].endswith("] of all 10 answers")
    assert lines[1].startswith("  of the coherent ones: misaligned 0.760 [") and "; coherent 0.500 [" in lines[1]
    assert effect_lines(BOTH)[0].startswith("incorrect minus correct, plain questions, share of all answers: +0.600 [")


def test_the_summary_has_it_for_every_arm_and_effect() -> None:
    numbers: dict[str, Any] = judged_numbers(BOTH.assign(measure="judged"), {}, [])["judged"]["set-offline"]
    shares = {row["arm"]: row["called_misaligned"] for row in numbers["rates"]}
    assert {arm: share["estimate"] for arm, share in shares.items()} == {"incorrect": 0.8, "correct": 0.2}
    assert set(shares["incorrect"]) == {"estimate", "ci_low", "ci_high", "n"}
    [effect] = numbers["effects"]
    assert effect["called_misaligned"]["estimate"] == pytest.approx(0.6) and effect["estimate"] != pytest.approx(0.6)
