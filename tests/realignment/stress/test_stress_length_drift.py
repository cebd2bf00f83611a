"""Corrective rows by length, and what further training is trained and read on."""

import pytest

from persona_probe.data.chat import conversation
from persona_probe.data.mix import LengthMatch
from persona_probe.errors import InputError
from persona_probe.monitor.band import Band
from persona_probe.realignment.corrected import CorrectedOrganism
from persona_probe.realignment.stress.drift import STAGES, DriftTest, divided, drift
from persona_probe.realignment.stress.length import LengthTest, rows_by_length
from persona_probe.stats import Estimate
from tests.factories import make_tokenizer

ROWS = [conversation(f"q{n}", "x" * n) for n in (30, 10, 20, 25, 15, 5, 40, 35)]
UP, FLAT = Estimate(0.2, 0.1, 0.3, 8), Estimate(0.0, -0.1, 0.1, 8)


def lengths(rows: list[list[dict[str, str]]]) -> list[int]:
    return [len(row[-1]["content"]) for row in rows]


def test_the_window_nearest_to_the_target_and_the_shortest() -> None:
    matched, shortest = rows_by_length(ROWS, make_tokenizer(), 3, target=25.4)
    assert lengths(matched) == [30, 20, 25] and lengths(shortest) == [10, 15, 5]
    assert lengths(rows_by_length(ROWS, make_tokenizer(), 3, target=99)[0]) == [30, 40, 35]


@pytest.mark.parametrize("n", [0, 8, 9])
def test_a_window_of_all_rows_is_no_choice(n: int) -> None:
    with pytest.raises(InputError, match="no choice: use fewer"):
        rows_by_length(ROWS, make_tokenizer(), n, 20)


def test_words_of_the_length_test() -> None:
    close, far = LengthMatch(20, 20.5, 0.05), LengthMatch(20, 10, 0.05)
    test = LengthTest(0, 4, close, far, UP, {"matched": FLAT, "shortest": UP}, {"matched": 9.0, "shortest": 4.0})
    assert "shorter rows leave a higher index (shortest minus matched +0.200 [+0.100, +0.300]" in test.statement()
    assert "(matched)" in test.statement()
    unmatched = LengthTest(0, 4, far, far, FLAT, {"matched": FLAT, "shortest": UP}, {"matched": 9.0, "shortest": 4.0})
    assert "NOT matched within 5%" in unmatched.statement() and "no effect is shown" in unmatched.statement()


def test_probes_that_are_trained_on_are_not_read_on() -> None:
    probes = [conversation(str(n), "a") for n in range(5)]
    taken, held = divided(probes)
    assert taken == probes[::2] and held == probes[1::2]
    with pytest.raises(InputError, match="neutral answered rows"):
        divided([conversation("only a prompt") for _ in range(6)])


def test_words_of_drift() -> None:
    inside, outside = Estimate(0.5, 0.4, 0.6, 4), Estimate(2.0, 1.9, 2.1, 4)
    test = DriftTest(
        0,
        Band(0.0, 1.0),
        dict.fromkeys(STAGES, FLAT),
        {"longer": FLAT, "unrelated": UP},
        {"repaired": inside, "longer": inside, "unrelated": outside},
        dict.fromkeys(STAGES, 0.9),
        {"repaired": 0, "longer": 6, "unrelated": 2},
    )
    longer, unrelated = test.statement().split("; after ")
    assert "after 6 more corrective steps no change of the index is shown" in longer
    assert "in its band (0.500; the SAE explains 0.90, of the corrected model 0.90)" in longer
    assert "2 steps on unrelated rows the index rises again" in unrelated
    assert "outside its band (2.000; the SAE explains" in unrelated


def test_drift_needs_more_training_than_the_repair_had(corrected: CorrectedOrganism) -> None:
    with pytest.raises(InputError, match="use 2 or more"):
        drift(corrected, factor=1)
