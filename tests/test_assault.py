"""The assault's own instruments: it counts, it sees what differs and what runs, and its page can be filled."""

import importlib
import json
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.assault import hostile_text
from benchmarks.assault.__main__ import MARKS, PARTS, table
from benchmarks.assault.counts import Count
from benchmarks.assault.hostile_strings import hostile_strings, marker
from benchmarks.assault.jobs import JOBS, differences, values
from persona_probe.report.tables import check_page
from tests.report.pages import Outline


def test_what_did_not_hold_is_counted_and_shown() -> None:
    count = Count("inputs: refused", 9, [f"case {n}" for n in range(7)])
    assert count.held == 2 and count.lines() == [*(f"case {n}" for n in range(5)), "and 2 more"]
    rows = table({"inputs": [count], "kills": [Count("kills: resumed", 8)]}).markdown().splitlines()
    assert rows[2:] == ["| inputs | inputs: refused | 9 | 2 |", "| kills | kills: resumed | 8 | 8 |"]


def test_every_part_is_there_and_so_is_its_page() -> None:
    check_page(Path(__file__).parents[1] / "docs" / "reliability.md", MARKS)
    for module in PARTS.values():
        assert callable(importlib.import_module(f"benchmarks.assault.{module}").assault)
    names = [job.name for job in JOBS]
    for place, job in enumerate(JOBS):
        assert not job.begins_with or job.begins_with in names[:place]


def write(folder: Path, seconds: float, value: float, names: list[str]) -> Path:
    folder.mkdir()
    pd.DataFrame({"value": [value], "seconds": [seconds]}).to_parquet(folder / "t.parquet")
    pd.DataFrame({"value": [value], "time_ratio": [seconds]}).to_csv(folder / "t.csv", index=False)
    (folder / "m.json").write_text(json.dumps({"hash": value, "seconds": {"a": seconds}, "modules": names}))
    (folder / "w.bin").write_bytes(str(value).encode())
    (folder / ".locks").mkdir()
    (folder / ".locks" / "run.lock").write_text(str(seconds))
    return folder


def test_times_may_differ_and_nothing_else_may(tmp_path: Path) -> None:
    first = values(write(tmp_path / "a", 1.0, 0.1, ["x", "y"]))
    assert differences(first, values(write(tmp_path / "b", 2.0, 0.1, ["y", "x"]))) == []
    other = write(tmp_path / "c", 1.0, 0.1 + 1e-9, ["x", "y"])
    assert differences(first, values(other)) == ["m.json", "t.csv", "t.parquet", "w.bin"]
    (other / "w.bin").unlink()
    assert "w.bin" in differences(first, values(other))


def test_the_hostile_strings_are_forty_and_would_run_if_they_could() -> None:
    strings = hostile_strings("http://127.0.0.1:9")
    assert len({*strings}) == len(strings) == 40
    assert all(marker(n) in text for n, text in enumerate(strings))
    tags = [tag for text in strings[:26] for tag in Outline(text).tags]
    assert {"script", "img", "iframe", "object", "link", "meta", "base", "form"} <= {*tags}
    assert all(hostile_text._formula(text) for text in strings[-3:])
    assert hostile_text.OBEYED.search(strings[34]) and hostile_text.OBEYED.search(strings[36])


@pytest.mark.parametrize("cell", ["-1.5", "3", "plain", "'=1+1", ""])
def test_a_number_is_no_formula(cell: str) -> None:
    assert not hostile_text._formula(cell)
