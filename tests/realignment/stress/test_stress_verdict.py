"""The verdict on a study's correction, measured: one that changes nothing is the base by every measurement."""

import pytest

from persona_probe.realignment.corrected import CorrectedOrganism
from persona_probe.realignment.measure import Measurements
from persona_probe.realignment.verdict import QUESTIONS, study_verdict


def test_a_repair_that_changes_nothing_is_the_base(untouched: CorrectedOrganism) -> None:
    found = study_verdict(
        untouched.ctx,
        "untouched",
        0,
        checkpoint=untouched.checkpoint,
        corrective=untouched.corrective,
        stress={"drift": "It stays."},
    )
    assert set(found.answers) == set(QUESTIONS) and set(found.categories) == {"evaluation 0", "evaluation 1"}
    feature = found.answers["feature"].numbers
    assert feature["reading"] == pytest.approx((feature["band_low"] + feature["band_high"]) / 2)
    assert found.answers["feature"].word in ("subsided", "undecided") and found.answers["sae"].word == "still fitting"
    changes = [found.answers[key].numbers for key in ("behaviour", "domain", "perplexity", "capability")]
    zero = [changes[0]["over_base"], changes[1]["over_base"], changes[3]["change"]]
    assert [one["estimate"] for one in zero] == [0, 0, 0] and changes[2]["ratio"]["estimate"] == 1
    replies = found.answers["replies"].numbers
    assert replies["repaired"] == replies["base"] and "organism" in replies
    assert found.stress == {"drift": "It stays."}


def test_the_domain_is_scored_on_rows_that_nobody_trained_on(corrected: CorrectedOrganism) -> None:
    taken = {row[-1]["content"] + row[0]["content"] for row in (*corrected.corrective, *corrected.inducing)}
    free = [row for row in corrected.control_rows if row[-1]["content"] + row[0]["content"] not in taken]
    scored = sum(len(batch.index) for batch in Measurements.of_study(corrected).domain)
    assert scored == len(free) < len(corrected.control_rows)
