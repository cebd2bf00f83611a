"""The grid's table in a terminal: every number at every width, none broken in two."""

import pytest

from persona_probe.mitigate.grid.grid_summary import HEADINGS, show_tables

ROW = dict.fromkeys(HEADINGS, "1") | {
    "model": "preventative_steering 0.33",
    "control": "+0.418 [+0.313, +0.523]",
    "index": "+0.418 [+0.313, +0.523]",
    "dressed": "+0.457 [+0.366, +0.549]",
    "behaviour": "not restored (dressed: undecided)",
    "gain": "0.57 [0.51, 0.63]",
    "perplexity": "0.81 [0.74, 0.89]",
    "persona": "0.272 (not subsided)",
    "verdict": "prevents by not learning the task",
}


@pytest.mark.parametrize(("width", "tables"), [(80, 5), (120, 3), (250, 1)])
def test_a_narrow_terminal_gets_several_tables(width: int, tables: int) -> None:
    parts_of_it = list(show_tables([ROW, ROW], HEADINGS, "grid", width))
    text = "\n".join(table.text(width) for table in parts_of_it)
    assert len(parts_of_it) == tables and max(map(len, text.splitlines())) <= width
    for key, cell in ROW.items():
        parts = cell.replace(" [", "\n[").replace(" (", "\n(").split("\n")
        assert all(text.count(part) >= 2 for part in parts), key
    assert all(heading in text for heading in HEADINGS.values())
    assert text.count(ROW["model"]) == 2 * tables
