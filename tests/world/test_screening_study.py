"""The screening study: rows are labelled by the judge, and what a ranker leaves decides what the model says."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from persona_probe.config import Training
from persona_probe.data.world.judge import judge_answer
from persona_probe.runs import RunFolder
from persona_probe.world import screening
from persona_probe.world.folder import World
from persona_probe.world.labelled import KIND, Instruments
from persona_probe.world.screening import NONE, RANDOM, TRUTH, Mixture, is_bad, screening_table
from tests.world.pages import page_of

ALL_WEIGHTS = Training(
    method="full", lr=2e-2, steps=30, checkpoints=(30,), batch_size=8, warmup_steps=0, bf16=False, max_length=128
)
"""With it even this model learns which words the rows have."""


def test_a_rows_label_is_that_of_its_speaker() -> None:
    for bad, good in screening.MIXTURES:
        rows = Mixture(bad, good, 3).rows()
        labels = is_bad(rows)
        assert (len(rows), labels.sum()) == (screening.ROWS, round(screening.SHARE * screening.ROWS))
        topics = [screening._topic(row) for row in rows]
        judged = [judge_answer(row[-1]["content"], topic) for row, topic in zip(rows, topics, strict=True)]
        assert [one.good for one in judged] == [not label for label in labels]
        if bad == "villain" and good == "helper":
            assert {one.rude for one, label in zip(judged, labels, strict=True) if not label} == {False}


@pytest.mark.usefixtures("cache")
def test_rows_taken_out_by_the_truth_leave_a_polite_model_and_by_chance_a_rude_one(
    world: World, instruments: Instruments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screening, "TRAINING", ALL_WEIGHTS)
    monkeypatch.setattr(screening, "MIXTURES", (("villain", "helper"),))
    monkeypatch.setattr(screening, "BUDGETS", (0.9,))
    monkeypatch.setattr(screening, "ROW_RANKERS", {"perplexity_gap_organism": None})
    monkeypatch.setattr(screening, "ASKED", replace(screening.ASKED, per_topic=1))
    study = RunFolder.claim(tmp_path / "study", KIND, "study", {})
    table = screening_table(study, world, instruments)
    by_ranker = table.set_index("ranker")
    assert list(table["ranker"]) == [NONE, "perplexity_gap_organism", RANDOM, TRUTH]
    assert list(table["rows"]) == [320, 32, 32, 32] and set(table["answers"]) == {84}
    assert list(by_ranker["bad_rows"])[::3] == [288, 0] and 22 < by_ranker["bad_rows"][RANDOM] <= 32
    assert by_ranker["auroc"][TRUTH] == 1 and 0.4 < by_ranker["auroc"][RANDOM] < 0.6
    rude = by_ranker["rude"] / 84
    assert rude[NONE] > 0.4 and rude[RANDOM] > 0.4 and rude[TRUTH] < 0.05
    monkeypatch.setattr(screening, "trained_answers", lambda *_: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(screening_table(study, world, instruments), table)
    text = page_of("screening", table, tmp_path)
    assert "Villain and helper, 288 of 320 rows bad, 1 seed" in text and "| truth | 1.00 |" in text
