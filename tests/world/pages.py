"""A study's table on a page: it comes from the record, byte for byte, whichever command fills it."""

from pathlib import Path

import pandas as pd

from persona_probe.world.tables import marks, text_of
from persona_probe.world.tables import page_of as place_of
from persona_probe.writing import write_table
from tests.factories import run_command


def page_of(study: str, table: pd.DataFrame, folder: Path) -> str:
    """Fill a page with a table by the study's command and by `tables`, compare both, and give the text between."""
    record = write_table(folder / "records" / f"{study}.parquet", table)
    begin, end = marks(study)
    pages = [folder / "one.md", place_of(study, folder / "other.md")]
    for page in pages:
        page.write_text(f"before\n{begin}\n{end}\nafter\n")
    run_command("world", "study", study, "--from", record, "--page", pages[0], "--quiet")
    run_command("world", "study", "tables", "--records", record.parent, "--page", pages[1], "--quiet")
    text = pages[0].read_text()
    assert text == pages[1].read_text() == f"before\n{begin}\n\n{text_of(study, table)}\n{end}\nafter\n"
    run_command("world", "study", "tables", "--records", record.parent, "--page", pages[1], "--check", "--quiet")
    return text_of(study, table)
