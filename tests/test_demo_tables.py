"""The pages on low precision and safety show what the demo's record says."""

from pathlib import Path

import pytest

from persona_probe.files import read_parquet
from tools.demo_tables import TEXTS, marks, page_of

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", TEXTS)
def test_a_page_has_the_table_of_the_record(name: str) -> None:
    begin, end = marks(name)
    page = page_of(ROOT / "docs", name).read_text(encoding="utf-8")
    shown = page.partition(begin)[2].partition(end)[0].strip()
    wanted = TEXTS[name](read_parquet(ROOT / "records" / "demo" / f"{name}.parquet")).strip()
    assert shown.splitlines() == wanted.splitlines() and len(shown.splitlines()) >= 4
