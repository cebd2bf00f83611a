"""`make coverage`: cases with known truth, its table, and the numbers that the page shows."""

from pathlib import Path

import pandas as pd

from benchmarks.coverage import CASES, MARKS, measure, table_of

ROOT = Path(__file__).parents[1]


def test_every_case_runs_and_is_one_row() -> None:
    frame = measure(share_of_trials=0.01)
    assert len(frame) == len(CASES) == len(table_of(frame).rows)
    assert frame["measured"].between(frame["ci_low"], frame["ci_high"]).all()
    pd.testing.assert_frame_equal(frame.drop(columns="seconds"), measure(share_of_trials=0.01).drop(columns="seconds"))


def test_the_page_shows_the_record() -> None:
    record = pd.read_parquet(ROOT / "records" / "coverage" / "coverage.parquet")
    shown = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8").split(MARKS[0])[1].split(MARKS[1])[0]
    assert shown.strip() == table_of(record).markdown()
    assert [(case.name, case.data) for case in CASES] == list(zip(record["name"], record["data"], strict=True))
